"""The launcher of the prebuilt CUDA kernels for compute capability 9.0 (cuda/dynamic_attention_fa3.cu).

As many programs as the GPU has multiprocessors take query tiles from one list. Everything is sized by shapes: no number
ever travels to the host.
"""

from functools import partial

import torch
from torch import Tensor

from . import packing
from .packing import DTYPES, PLAN, TAIL
from .tiles import longest_first

SOURCE = "dynamic_attention_fa3"
KEYS, SLOTS, THREADS = 128, 32, 384  # of a tile of keys; that a warp looks up; of a program
HIGH, LOW = 128, 64  # rows of the two query tiles


class Params(packing.Parameters):
    """The kernels' one parameter, field for field."""

    _fields_ = packing.Parameters.fields(
        ("q", "k", "v", "out", "q_order", "k_order", "k_offsets", "block_map", *PLAN, "items", "next", *TAIL),
        ("heads", "n_video", "video_start", "n_text", "c_q", "c_k", "tiles", "n_items"),
    )


def shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory of a program: its queries and 768 / D parts of keys or values, the biases of every other part,
    sums of one consumer, what is said of items, barriers."""
    part, parts = KEYS * 2 * head_dim, 768 // head_dim
    return (1 + parts) * part + parts // 2 * KEYS * 4 + 512 + 32 + 2 * 16 + (2 * parts + 2) * 8


def load(device: torch.device):
    """The kernels on a device; raises where they cannot be had (see cuda/driver.py)."""
    from ....cuda import driver

    return driver.load(SOURCE, device)


def programs(device: torch.device) -> int:
    """How many run at a time. Elsewhere than on a GPU they are emulated: a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@torch.library.custom_op("svg2::dynamic_attention_fa3", mutates_args=("out",))
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
                            scale, tiles=-(-n_video // SLOTS))  # fmt: skip
    params.point(q_order=q_order, k_order=k_order, k_offsets=k_offsets)
    alive += [q, k, v, out, q_order, k_order, k_offsets, block_map, tail_keys, tail_values]
    module.kernel("svg2_plan").launch((c_q, rows), (packing.PLAN_THREADS,), packing.PLAN_SHARED, None, params, keep_alive=alive)

    plan, cost = params.plan, -(-params.n_text // KEYS)
    cost = (plan["n_keys"] + (KEYS - 1)) // KEYS + cost
    if tail_keys is not None:
        cost += (plan["n_filled"] - plan["n_selected"] + (KEYS - 1)) // KEYS
    items = longest_first(q_offsets.flatten(0, 1), cost, n_video, HIGH, LOW)
    first = torch.zeros(1, dtype=torch.int32, device=q.device)
    params.point(items=items, next=first)
    params.n_items = len(items)
    kernel = module.kernel(f"svg2_attention_{DTYPES[q.dtype]}_{d}")
    grid = (min(programs(q.device), len(items)), 1)
    kernel.launch(grid, (THREADS,), shared_bytes(d), None, params, keep_alive=[*alive, items, first])


@attend.register_fake
def _(*_):
    return None


dynamic_attention = partial(packing.call, attend)  # see `__init__.py`; head dimensions 64 and 128, fp16 and bf16
