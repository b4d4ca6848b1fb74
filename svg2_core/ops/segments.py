"""Sums over clusters of rows that stand in cluster order: segments of a matrix, given by their offsets."""

import torch
import torch.nn.functional as F


def labels_in_order(offsets: torch.Tensor) -> torch.Tensor:
    """The cluster of each place of the cluster order, int64 `[N]`, from offsets int32 `[C + 1]`. Waits for the device."""
    return torch.repeat_interleave(offsets.diff().long())


def segment_mean(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Means of the rows of x `[N, W]` fp32 in each segment, `[C, W]`; zero for an empty one."""
    return _reduce(x, offsets, "sum") / offsets.diff().clamp_min(1)[:, None]


def segment_max(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Column-wise maxima of the rows in each segment, `[C, W]`; zero for an empty one."""
    return _reduce(x, offsets, "max")


def _reduce(x: torch.Tensor, offsets: torch.Tensor, mode: str) -> torch.Tensor:
    # A bag of an embedding table is a segmented sum, and torch's quickest on a CPU: one thread a segment, in order.
    if x.shape[1] == 0:
        return x.new_zeros(len(offsets) - 1, 0)
    places = torch.arange(len(x), device=x.device)
    return F.embedding_bag(places, x.contiguous(), offsets.long(), mode=mode, include_last_offset=True)
