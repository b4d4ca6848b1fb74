"""The launcher of the prebuilt CUDA kernels (cuda/dynamic_attention_fa2.cu): the same plan and tiles as the Triton ones.

Everything is sized by shapes: no number ever travels to the host.
"""

from functools import partial

import torch
from torch import Tensor

from . import packing
from .packing import DTYPES, PLAN, TAIL
from .tiles import launches

SOURCE = "dynamic_attention_fa2"
KEYS, THREADS = 64, 128  # of a tile of keys; of a program
HIGH, LOW = 128, 64  # rows of the two query tiles


class Params(packing.Parameters):
    """The kernels' one parameter, field for field."""

    _fields_ = packing.Parameters.fields(
        ("q", "k", "v", "out", "q_order", "q_offsets", "tile_ends", "k_order", "k_offsets", "block_map", *PLAN, *TAIL),
        ("heads", "n_video", "video_start", "n_text", "c_q", "c_k", "tiles", "rest", "full"),
    )


def shared_bytes(head_dim: int, rows: int) -> int:
    """Dynamic shared memory of a program: its queries, two turns of keys and values, three of rows and biases, tokens."""
    return rows * 2 * head_dim + 4 * KEYS * 2 * head_dim + 3 * KEYS * 8 + rows * 4


def load(device: torch.device):
    """The kernels on a device; raises where they cannot be had (see cuda/driver.py)."""
    from ....cuda import driver

    return driver.load(SOURCE, device)


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
    rows, d, c_q, n_video = q.shape[0] * q.shape[1], q.shape[3], block_map.shape[2], q_order.shape[2]
    params = Params()
    alive = params.describe(q, k, v, out, block_map, tail_keys, tail_values, tail_biases, text_bias, video_start, n_video,
                            scale, tiles=-(-n_video // KEYS))  # fmt: skip
    params.point(q_order=q_order, q_offsets=q_offsets, k_order=k_order, k_offsets=k_offsets)
    params.full = HIGH
    alive += [q, k, v, out, q_order, q_offsets, k_order, k_offsets, block_map, tail_keys, tail_values]
    module.kernel("svg2_plan").launch((c_q, rows), (packing.PLAN_THREADS,), packing.PLAN_SHARED, None, params, keep_alive=alive)
    for launch in launches(q_offsets.diff(dim=-1), n_video, HIGH, LOW):
        params.point(tile_ends=launch.ends)
        params.rest = launch.rest
        kernel = module.kernel(f"svg2_attention_{DTYPES[q.dtype]}_{d}_{launch.rows}")
        kernel.launch((launch.most, rows), (THREADS,), shared_bytes(d, launch.rows), None, params, keep_alive=[*alive, launch])


@attend.register_fake
def _(*_):
    return None


dynamic_attention = partial(packing.call, attend)  # see `__init__.py`; head dimensions 64 and 128, fp16 and bf16
