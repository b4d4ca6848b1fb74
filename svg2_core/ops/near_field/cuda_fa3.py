"""The launcher of the prebuilt CUDA kernels for compute capability 9.0 (cuda/near_field_fa3.cu): as many programs as the GPU has
multiprocessors take the plan's query tiles in turn."""

import torch

from .packing import DTYPES, Params, operator
from .plan import Plan

SOURCE = "near_field_fa3"
KEYS, THREADS = 128, 384  # of a step; of a program


def shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory of a program: its queries and 768 / D parts of keys or values, the biases of every other part,
    sums of one consumer, what is said of query tiles, barriers."""
    part, parts = KEYS * 2 * head_dim, 768 // head_dim
    return (1 + parts) * part + parts // 2 * KEYS * 4 + 512 + 32 + 2 * 16 + (2 * parts + 2) * 8


def load(device: torch.device):
    """The kernels on a device; raises where they cannot be had (see cuda/driver.py)."""
    from ....cuda import driver

    return driver.load(SOURCE, device)


def programs(device: torch.device) -> int:
    """How many run at a time. Elsewhere than on a GPU they are emulated: a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _launch(q: torch.Tensor, params: Params, plan: Plan, alive: list) -> None:
    module, d = load(q.device), q.shape[3]
    taken = torch.zeros(params.rows, dtype=torch.int32, device=q.device)
    params.point(next=taken)
    kernel = module.kernel(f"svg2_near_field_{DTYPES[q.dtype]}_{d}")
    grid = (min(programs(q.device), params.rows * sum(plan.bounds)), 1)
    kernel.launch(grid, (THREADS,), shared_bytes(d), None, params, keep_alive=[*alive, taken])


near_field = operator(SOURCE, _launch)
