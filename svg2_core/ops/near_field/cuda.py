"""The launcher of the prebuilt CUDA kernels (cuda/near_field_fa2.cu): the same plan as the Triton ones'."""

import torch

from .packing import DTYPES, Params, operator
from .plan import HIGH, LOW, Plan

SOURCE = "near_field_fa2"
KEYS, THREADS = 64, 128  # of a step; of a program


def shared_bytes(head_dim: int, rows: int) -> int:
    """Dynamic shared memory of a program: its queries, two turns of keys and values, three of rows and biases, tokens."""
    return rows * 2 * head_dim + 4 * KEYS * 2 * head_dim + 3 * KEYS * 8 + rows * 4


def load(device: torch.device):
    """The kernels on a device; raises where they cannot be had (see cuda/driver.py)."""
    from ....cuda import driver

    return driver.load(SOURCE, device)


def _launch(q: torch.Tensor, params: Params, plan: Plan, alive: list) -> None:
    module, d = load(q.device), q.shape[3]
    for rows, most, tiles, numbers in zip((HIGH, LOW), plan.bounds, plan.tiles, plan.numbers, strict=True):
        if most == 0:
            continue
        params.point(tiles=tiles, numbers=numbers)
        kernel = module.kernel(f"svg2_near_field_{DTYPES[q.dtype]}_{d}_{rows}")
        kernel.launch((most, params.rows), (THREADS,), shared_bytes(d, rows), None, params, keep_alive=alive)


near_field = operator(SOURCE, _launch)
