"""Tile sizes of the Triton kernels of near and far field, by architecture. No autotuning: a first call must not stall for minutes.

Chosen so that nothing spills and shared memory fits (tests/kernels/test_compile.py); not yet tuned on a GPU.
"""

from dataclasses import dataclass

import torch

from .. import triton_common
from .plan import HIGH, LOW


@dataclass(frozen=True)
class Tile:
    """Rows of a query tile, keys of a key block, and Triton's compile options for the kernel."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """high, low: the two sizes of query tile; low serves a cluster's remainder."""

    high: Tile
    low: Tile


_HOPPER = Config(high=Tile(HIGH, 64, 8, 3), low=Tile(LOW, 64, 4, 3))
# Without wgmma (sm_80 to 89, 120) the products' operands live in registers: smaller key blocks, or they spill.
_DEFAULT = Config(high=Tile(HIGH, 32, 8, 3), low=Tile(LOW, 32, 4, 3))
_AMPERE = Config(high=Tile(HIGH, 32, 8, 3), low=Tile(LOW, 32, 8, 2))
FAR = _DEFAULT  # the far field's, the same everywhere until it is tuned


def config_for(capability: tuple[int, int]) -> Config:
    """The configuration for a compute capability."""
    return _HOPPER if capability[0] == 9 else _AMPERE if capability == (8, 0) else _DEFAULT


def config_for_device(device: torch.device) -> Config:
    """The same for a device."""
    return config_for(triton_common.capability_of(device))
