"""Launchers of the prebuilt CUDA kernels (cuda/near_field_fa2.cu, near_field_fa3.cu): one for each backend in `PREBUILT`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..implementations import PREBUILT
from .packing import DTYPES, Params, operator
from .plan import HIGH, LOW, Plan


@dataclass
class Launcher:
    """A source's kernels, and what differs between sources.

    threads: of a program. shared_bytes: dynamic shared memory of a program, by head dimension and, where kernels differ in it, rows of
    a query tile. launches: of a call, each with what follows the dtype and head dimension in the kernel's name, its grid, and its
    shared memory; sets the parameters that differ between launches, and appends to `alive` what else the kernels read.
    """

    source: str
    threads: int
    shared_bytes: Callable[..., int]
    launches: Callable[[torch.device, int, Params, Plan, list], Iterator[tuple[str, tuple[int, int], int]]]

    def __post_init__(self):
        self.near_field = operator(self.source, self._launch)

    def load(self, device: torch.device):
        """The kernels on a device; raises where they cannot be had (see cuda/driver.py)."""
        from ....cuda import driver

        return driver.load(self.source, device)

    def _launch(self, q: torch.Tensor, params: Params, plan: Plan, alive: list) -> None:
        module, d = self.load(q.device), q.shape[3]
        for suffix, grid, shared in self.launches(q.device, d, params, plan, alive):
            kernel = module.kernel(f"svg2_near_field_{DTYPES[q.dtype]}_{d}{suffix}")
            kernel.launch(grid, (self.threads,), shared, None, params, keep_alive=alive)


def _fa2_shared_bytes(head_dim: int, rows: int, keys: int = 64) -> int:
    """The query tile, two stages of keys and values, three of their rows and biases, the tile's tokens; keys: of a step."""
    return rows * 2 * head_dim + 4 * keys * 2 * head_dim + 3 * keys * 8 + rows * 4


def _fa2_launches(device, head_dim, params, plan, alive):
    """A program for each query tile that there can be: high ones, then low ones."""
    for rows, max_tiles, tiles, tile_counts in zip((HIGH, LOW), plan.max_tiles, plan.tiles, plan.tile_counts, strict=True):
        if max_tiles:
            params.point(tiles=tiles, tile_counts=tile_counts)
            yield f"_{rows}", (max_tiles, params.rows), _fa2_shared_bytes(head_dim, rows)


def _fa3_shared_bytes(head_dim: int, keys: int = 128) -> int:
    """The query tile and a ring of 768 / D stages of keys or values, the biases of every other stage, row sums and maxima of one
    consumer, headers of query tiles, barriers; keys: of a step."""
    stage, stages = keys * 2 * head_dim, 768 // head_dim
    return (1 + stages) * stage + stages // 2 * keys * 4 + 512 + 32 + 2 * 16 + (2 * stages + 2) * 8


def _fa3_launches(device, head_dim, params, plan, alive):
    """Persistent programs, which fetch query tiles by a counter for each row."""
    next_tile = torch.zeros(params.rows, dtype=torch.int32, device=device)
    params.point(next_tile=next_tile)
    alive.append(next_tile)
    yield "", (min(persistent_programs(device), params.rows * sum(plan.max_tiles)), 1), _fa3_shared_bytes(head_dim)


def persistent_programs(device: torch.device) -> int:
    """One for each multiprocessor. Elsewhere than on a GPU they are emulated: a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


LAUNCHERS = {
    "cuda": Launcher(PREBUILT["cuda"].source, 128, _fa2_shared_bytes, _fa2_launches),
    "cuda_fa3": Launcher(PREBUILT["cuda_fa3"].source, 384, _fa3_shared_bytes, _fa3_launches),
}
