"""The record of GPUs on which these kernels have been measured to be faster than the host's own.

An entry stands for a measurement by tests/benchmarks/fused.py against the fastest that the host has: plain torch, or
comfy_kitchen's kernels. Nothing has been measured yet, so nothing is faster until someone has.
"""

import torch

NORM = "norm"  # a norm alone
MODULATION = "norm + modulation"
ROTARY = "norm + rotary embedding"
KINDS = (NORM, MODULATION, ROTARY)

# By major compute capability and kind: the record that shows it.
FASTER: dict[tuple[int, str], str] = {}


def record(device: torch.device, kind: str) -> str | None:
    """The measurement that says the kernels of this kind are faster here; None where there is none."""
    if device.type != "cuda":
        return None
    return FASTER.get((torch.cuda.get_device_capability(device)[0], kind))
