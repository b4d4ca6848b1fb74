"""The launcher of the prebuilt CUDA kernels (cuda/dynamic_attention_fa2.cu): the same plan and tiles as the Triton ones.

Everything is sized by shapes: no number ever travels to the host.
"""

import ctypes

import torch
from torch import Tensor

from . import Tail
from .tiles import in_precision, launches, text_queries

SOURCE = "dynamic_attention_fa2"
HEAD_DIMS = (64, 128)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
KEYS, THREADS = 64, 128  # of a tile of keys; of a program
HIGH, LOW = 128, 64  # rows of the two query tiles

_POINTERS = (
    "q", "k", "v", "out", "q_order", "q_offsets", "tile_ends", "k_order", "k_offsets", "block_map",
    "ids", "ends", "shifts", "first_rank", "n_selected", "n_filled", "n_keys",
    "text_bias", "tail_keys", "tail_values", "tail_biases",
)  # fmt: skip
_STRIDES = tuple(f"{tensor}_{axis}" for tensor in "qkvo" for axis in "bhn")
_COUNTS = ("heads", "n_video", "video_start", "n_text", "c_q", "c_k", "tiles", "rest", "full")


class Params(ctypes.Structure):
    """The kernels' one parameter, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in _COUNTS),
    ]

    def point(self, **tensors: torch.Tensor | None) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else tensor.data_ptr())


def shared_bytes(head_dim: int, rows: int) -> int:
    """Dynamic shared memory of a program: its queries, two turns of keys and values, three of rows and biases, tokens."""
    return rows * 2 * head_dim + 4 * KEYS * 2 * head_dim + 3 * KEYS * 8 + rows * 4


def load(device: torch.device):
    """The kernels on a device; raises where they cannot be had (see cuda/driver.py)."""
    from ....cuda import driver

    return driver.load(SOURCE, device)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x itself if its rows can be copied 16 bytes at a time, else a copy."""
    aligned = x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if aligned else x.contiguous()


def dynamic_attention(q, k, v, out, q_clusters, k_clusters, block_map, *, layout, scale, tail):
    """See `dynamic_attention` in `__init__.py`; head dimensions 64 and 128, fp16 and bf16."""
    given = out
    q, k, v, out = (_readable(x) for x in (q, k, v, out))
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


@torch.library.custom_op("svg2::dynamic_attention_fa2", mutates_args=("out",))
def attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    q_order: Tensor, q_offsets: Tensor, k_order: Tensor, k_offsets: Tensor, block_map: Tensor,
    tail_keys: Tensor | None, tail_values: Tensor | None, tail_biases: Tensor | None, text_bias: Tensor | None,
    video_start: int, scale: float,
) -> None:  # fmt: skip
    """The video queries' part of `dynamic_attention`, written into `out`; arguments as in its contract, ready to be read
    16 bytes at a time. An operator of torch's, so that a traced program can hold it."""
    module = load(q.device)
    b, h, n, d = q.shape
    rows, c_q, c_k, n_video = b * h, block_map.shape[2], block_map.shape[3], q_order.shape[2]
    tiles = -(-n_video // KEYS)

    def empty(*shape):
        return torch.empty(rows, c_q, *shape, dtype=torch.int32, device=q.device)

    plan = {name: empty(c_k) for name in ("ids", "ends", "shifts")} | {"first_rank": empty(tiles)}
    plan |= {name: empty() for name in ("n_selected", "n_filled", "n_keys")}
    # Biases in units of the products, which the kernel multiplies by the scale.
    biases = {name: None if x is None else x.float().div(scale).contiguous()
              for name, x in (("text_bias", text_bias), ("tail_biases", tail_biases))}  # fmt: skip
    params = Params()
    params.point(q=q, k=k, v=v, out=out, q_order=q_order, q_offsets=q_offsets, k_order=k_order, k_offsets=k_offsets,
                 block_map=block_map, tail_keys=tail_keys, tail_values=tail_values, **biases, **plan)  # fmt: skip
    for name, x in zip("qkvo", (q, k, v, out), strict=True):
        for axis, stride in zip("bhn", x.stride(), strict=False):
            setattr(params, f"{name}_{axis}", stride)
    params.scale = scale * 1.4426950408889634
    params.heads, params.n_video, params.video_start, params.n_text = h, n_video, video_start, n - n_video
    params.c_q, params.c_k, params.tiles, params.full = c_q, c_k, tiles, HIGH

    alive = [q, k, v, out, q_order, q_offsets, k_order, k_offsets, block_map, tail_keys, tail_values, biases, plan]
    module.kernel("svg2_plan").launch((c_q, rows), (THREADS,), 3 * 4 * THREADS, None, params, keep_alive=alive)
    for launch in launches(q_offsets.diff(dim=-1), n_video, HIGH, LOW):
        params.point(tile_ends=launch.ends)
        params.rest = launch.rest
        kernel = module.kernel(f"svg2_attention_{DTYPES[q.dtype]}_{d}_{launch.rows}")
        kernel.launch((launch.most, rows), (THREADS,), shared_bytes(d, launch.rows), None, params, keep_alive=[*alive, launch])


@attend.register_fake
def _(*_):
    return None
