"""Error metrics of a result against a reference."""

import math

import torch


def rel_l2(result: torch.Tensor, reference: torch.Tensor) -> float:
    """||result - reference|| / ||reference||, in fp64."""
    reference = reference.double()
    return ((result.double() - reference).norm() / reference.norm()).item()


def psnr(result: torch.Tensor, reference: torch.Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of values in 0..peak; infinite for equal tensors."""
    mse = (result.double() - reference.double()).square().mean().item()
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)
