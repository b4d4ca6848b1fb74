"""What the launchers of the prebuilt kernels share: tensors as the kernels read them, and the kernels' one parameter."""

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor

from . import Tail
from .tiles import in_precision, text_queries

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
PLAN_THREADS, PLAN_SHARED = 128, 3 * 4 * 128  # of a program that plans; bytes
PLAN = ("ids", "ends", "shifts", "first_rank", "n_selected", "n_filled", "n_keys")
TAIL = ("text_bias", "tail_keys", "tail_values", "tail_biases")
_STRIDES = tuple(f"{tensor}_{axis}" for tensor in "qkvo" for axis in "bhn")


class Parameters(ctypes.Structure):
    """The one parameter of a source's kernels; a subclass has its fields from `fields`."""

    @staticmethod
    def fields(pointers: Iterable[str], counts: Iterable[str]) -> list[tuple]:
        """Pointers, strides, the scale, counts: in this order in every source."""
        return [
            *((name, ctypes.c_void_p) for name in pointers),
            *((name, ctypes.c_int64) for name in _STRIDES),
            ("scale", ctypes.c_float),
            *((name, ctypes.c_int32) for name in counts),
        ]

    def point(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else tensor.data_ptr())

    def describe(
        self, q, k, v, out, block_map, tail_keys, tail_values, tail_biases, text_bias, video_start, n_video, scale, tiles
    ) -> list[Tensor]:
        """Fill in what all sources ask for, the plan's lists with `tiles` places for ranks among them. Returns new tensors,
        which have to live as long as the kernels read them."""
        b, h, n, _ = q.shape
        c_q, c_k = block_map.shape[2:]

        def empty(*shape):
            return torch.empty(b * h, c_q, *shape, dtype=torch.int32, device=q.device)

        plan = {name: empty(c_k) for name in ("ids", "ends", "shifts")} | {"first_rank": empty(tiles)}
        plan |= {name: empty() for name in ("n_selected", "n_filled", "n_keys")}
        # Biases in units of the products, which the kernel multiplies by the scale.
        biases = {name: None if x is None else x.float().div(scale).contiguous()
                  for name, x in (("text_bias", text_bias), ("tail_biases", tail_biases))}  # fmt: skip
        self.point(q=q, k=k, v=v, out=out, block_map=block_map, tail_keys=tail_keys, tail_values=tail_values, **biases, **plan)
        for name, x in zip("qkvo", (q, k, v, out), strict=True):
            for axis, stride in zip("bhn", x.stride(), strict=False):
                setattr(self, f"{name}_{axis}", stride)
        self.scale = scale * 1.4426950408889634
        self.heads, self.n_video, self.video_start, self.n_text = h, n_video, video_start, n - n_video
        self.c_q, self.c_k, self.tiles = c_q, c_k, tiles
        self.plan = plan  # for launchers that go on from it
        return [*plan.values(), *(x for x in biases.values() if x is not None)]


def readable(x: Tensor) -> Tensor:
    """x itself if its rows can be copied 16 bytes at a time, else a copy."""
    aligned = x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if aligned else x.contiguous()


def call(attend, q, k, v, out, q_clusters, k_clusters, block_map, *, layout, scale, tail) -> None:
    """`dynamic_attention` of the contract by `attend`, an operator that serves the video queries."""
    given = out
    q, k, v, out = (readable(x) for x in (q, k, v, out))
    text_bias = layout.text_bias if layout.video_len < q.shape[2] else None
    tail = Tail(None, None, None) if tail is None else in_precision(tail, q.dtype)
    attend(
        q, k, v, out, q_clusters.order.contiguous(), q_clusters.offsets.contiguous(), k_clusters.order.contiguous(),
        k_clusters.offsets.contiguous(), block_map.contiguous(), tail.keys, tail.values, tail.biases, text_bias,
        layout.video_start, scale,
    )  # fmt: skip
    text_queries(q, k, v, out, layout, scale)
    if out is not given:
        given.copy_(out)
