"""Tile sizes of the Triton kernels per architecture. No tuning at run time: a first call must not stall for minutes.

Chosen so that nothing spills and shared memory fits (tests/kernels/test_compile.py); not yet tuned on a GPU.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Query rows of a tile, and how Triton compiles its kernel."""

    rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """keys: per step of the softmax. high, low: the two heights of query tiles; low serves a cluster's last rows."""

    keys: int
    high: Tile
    low: Tile


_HOPPER = Config(keys=64, high=Tile(128, 8, 2), low=Tile(64, 4, 2))
# Without wgmma (sm_80 to 89, 120) the products' operands live in registers: shorter steps, or they spill.
_DEFAULT = Config(keys=32, high=Tile(128, 8, 2), low=Tile(64, 4, 3))


def config_for(capability: tuple[int, int]) -> Config:
    """The configuration for a compute capability."""
    return _HOPPER if capability[0] == 9 else _DEFAULT


def config_for_device(device: torch.device) -> Config:
    """The same for a device; the interpreter on a CPU takes the default."""
    return config_for(torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0))
