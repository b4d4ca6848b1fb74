"""How near to the fp64 truth a result has to be: as near as torch's own attention in the same dtype, within a factor."""

import brute_force
import torch
import torch.nn.functional as F


def errors(result: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Relative L2 error and largest error over largest value."""
    difference = result.double() - truth
    return (difference.norm() / truth.norm()).item(), (difference.abs().max() / truth.abs().max()).item()


def assert_as_good_as_torch(result, q, keys, values, bias, scale):
    """result's error against fp64 is at most twice that of torch's attention on the same keys, values and bias.

    The floor is one rounding of the result itself: torch's error may by luck be near nothing.
    """
    truth = brute_force.attention(q, keys, values, bias, scale)
    torchs = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), bias.to(q.dtype), scale=scale)
    floor = torch.finfo(q.dtype).eps / 2
    assert result.dtype == q.dtype and result.shape == truth.shape
    for name, ours, theirs in zip(
        ("relative L2", "largest"), errors(result, truth), errors(torchs, truth), strict=True
    ):
        assert ours <= 2 * theirs + floor, f"{name} error {ours:.2e}, torch's own attention has {theirs:.2e}"
