"""The widest float of a device, some of which have no fp64."""

import torch

_WITHOUT_FP64 = {"mps"}


def widest(device: torch.device) -> torch.dtype:
    """The widest float a device computes in."""
    return torch.float32 if device.type in _WITHOUT_FP64 else torch.float64


def in_fp64(x: torch.Tensor) -> torch.Tensor:
    """A small matrix in fp64: where it is, or on the CPU if its device has no fp64."""
    return x.cpu().double() if x.device.type in _WITHOUT_FP64 else x.double()
