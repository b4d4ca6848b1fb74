"""The one parameter of the prebuilt kernels, and the operator of torch's around their launch."""

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kmeans import Clusters
from .plan import GRANULE, Plan, plan
from .text_queries import text_queries

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_POINTERS = (
    "q", "k", "v", "out", "logsumexp", "q_order", "q_offsets", "keys", "granule_lists", "granule_counts", "tiles", "tile_counts",
    "next_tile", "text_bias",
)  # fmt: skip
_STRIDES = tuple(f"{tensor}_{axis}" for tensor in "qkvo" for axis in "bhn")
_COUNTS = ("rows", "heads", "n_queries", "q_start", "n_video", "video_start", "n_text", "c_q", "granules", "tile_stride")


class Params(ctypes.Structure):
    """cuda/near_field.cuh's, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in _COUNTS),
    ]

    def point(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else tensor.data_ptr())


def operator(name: str, launch: Callable[[Tensor, Params, Plan, list], None]):
    """`near_field` of an implementation by its `launch` of (q, parameters, plan, tensors to keep alive), for head dimensions 64
    and 128, fp16 and bf16."""

    @torch.library.custom_op(f"svg2::{name}", mutates_args=("out", "logsumexp"))
    def attend(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
        q_order: Tensor, q_offsets: Tensor, k_order: Tensor, k_offsets: Tensor, selected: Tensor, text_bias: Tensor | None,
        q_start: int, video_start: int, scale: float,
    ) -> None:  # fmt: skip
        """The video queries' part of `near_field`, written into `out` and `logsumexp`; arguments as in its contract, ready to be
        read 16 bytes at a time. An operator of torch's, so that a traced program can hold it."""
        planned = plan(Clusters(q_order, q_offsets, None), Clusters(k_order, k_offsets, None), selected)
        # In units of the products: the kernels scale both at once.
        bias = None if text_bias is None else text_bias.float().div(scale).contiguous()
        tensors = {
            "q": q, "k": k, "v": v, "out": out, "logsumexp": logsumexp, "q_order": q_order, "q_offsets": q_offsets, "keys": planned.keys,
            "granule_lists": planned.granule_lists, "granule_counts": planned.granule_counts, "tiles": planned.tiles,
            "tile_counts": planned.tile_counts, "text_bias": bias,
        }  # fmt: skip
        params = Params()
        params.point(**tensors)
        for name, x in zip("qkvo", (q, k, v, out), strict=True):
            for axis, stride in zip("bhn", x.stride(), strict=False):
                setattr(params, f"{name}_{axis}", stride)
        params.scale = scale * 1.4426950408889634
        params.rows, params.heads = q.shape[0] * q.shape[1], q.shape[1]
        params.n_queries, params.q_start = q_order.shape[2], q_start
        params.n_video, params.video_start, params.n_text = k_order.shape[2], video_start, k.shape[2] - k_order.shape[2]
        params.c_q, params.granules, params.tile_stride = selected.shape[2], planned.keys.shape[1] // GRANULE, planned.tiles.shape[2]
        launch(q, params, planned, [x for x in tensors.values() if x is not None])

    attend.register_fake(lambda *_: None)
    return partial(_near_field, attend)


def readable(x: Tensor) -> Tensor:
    """x itself if its rows can be copied 16 bytes at a time, else a copy."""
    aligned = x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if aligned else x.contiguous()


def _near_field(attend, q, k, v, out, q_clusters, k_clusters, selected, *, layout, scale) -> Tensor:
    given = out
    q, k, v, out = (readable(x) for x in (q, k, v, out))
    logsumexp = torch.empty(*q.shape[:2], layout.queries_len, dtype=torch.float32, device=q.device)
    attend(
        q, k, v, out, logsumexp, q_clusters.order.contiguous(), q_clusters.offsets.contiguous(), k_clusters.order.contiguous(),
        k_clusters.offsets.contiguous(), selected.contiguous(), layout.text_bias if layout.video_len < k.shape[2] else None,
        layout.video_queries.start, layout.video_start, scale,
    )  # fmt: skip
    text_queries(q, k, v, out, layout, scale)
    if out is not given:
        given.copy_(out)
    return logsumexp
