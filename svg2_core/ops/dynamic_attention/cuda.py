"""The launcher of the prebuilt CUDA kernels (cuda/dynamic_attention_fa2.cu): the same plan and tiles as the Triton ones.

Everything is sized by shapes: no number ever travels to the host.
"""

import ctypes

import torch

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

    _fields_ = [  # noqa: RUF012
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
    module = load(q.device)
    given = out
    q, k, v, out = (_readable(x) for x in (q, k, v, out))
    b, h, n, d = q.shape
    rows, c_q, c_k = b * h, block_map.shape[2], block_map.shape[3]
    tiles = -(-layout.video_len // KEYS)
    n_text = n - layout.video_len

    def empty(*shape):
        return torch.empty(rows, c_q, *shape, dtype=torch.int32, device=q.device)

    plan = {name: empty(c_k) for name in ("ids", "ends", "shifts")} | {"first_rank": empty(tiles)}
    plan |= {name: empty() for name in ("n_selected", "n_filled", "n_keys")}
    # Biases in units of the products, which the kernel multiplies by the scale.
    bias = layout.text_bias.float().div(scale).contiguous() if n_text and layout.text_bias is not None else None
    tail = None if tail is None else in_precision(tail, q.dtype)
    tail_biases = None if tail is None else tail.biases.div(scale).contiguous()
    clusters = [field.contiguous() for field in (q_clusters.order, q_clusters.offsets, k_clusters.order, k_clusters.offsets, block_map)]

    params = Params()
    params.point(q=q, k=k, v=v, out=out, text_bias=bias, tail_biases=tail_biases, **plan,
                 **dict(zip(("q_order", "q_offsets", "k_order", "k_offsets", "block_map"), clusters, strict=True)),
                 tail_keys=None if tail is None else tail.keys, tail_values=None if tail is None else tail.values)  # fmt: skip
    for name, x in zip("qkvo", (q, k, v, out), strict=True):
        for axis, stride in zip("bhn", x.stride(), strict=False):
            setattr(params, f"{name}_{axis}", stride)
    params.scale = scale * 1.4426950408889634
    params.heads, params.n_video, params.video_start, params.n_text = h, layout.video_len, layout.video_start, n_text
    params.c_q, params.c_k, params.tiles, params.full = c_q, c_k, tiles, HIGH

    alive = [q, k, v, out, bias, tail_biases, tail, clusters, plan]
    module.kernel("svg2_plan").launch((c_q, rows), (THREADS,), 3 * 4 * THREADS, None, params, keep_alive=alive)
    for launch in launches(q_clusters, layout.video_len, HIGH, LOW):
        params.point(tile_ends=launch.ends)
        params.rest = launch.rest
        kernel = module.kernel(f"svg2_attention_{DTYPES[q.dtype]}_{d}_{launch.rows}")
        kernel.launch((launch.most, rows), (THREADS,), shared_bytes(d, launch.rows), None, params, keep_alive=[*alive, launch])
    text_queries(q, k, v, out, layout, scale)
    if out is not given:
        given.copy_(out)
