"""Segmented sums, means and maxima: over rows of a matrix in cluster order, segments given by their offsets."""

import torch
import torch.nn.functional as F

_LONG = 256  # rows that are summed sequentially


def labels_in_order(offsets: torch.Tensor) -> torch.Tensor:
    """The cluster of each position in cluster order, int64 `[N]`, from offsets int32 `[C + 1]`. Waits for the device."""
    return torch.repeat_interleave(offsets.diff().long())


def segment_sum(x: torch.Tensor, offsets: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """Sums of the rows of x `[N, W]` fp32 in each segment, `[C, W]`; order: x's rows, as they stand in the segments."""
    if x.shape[1] == 0:
        return x.new_zeros(len(offsets) - 1, 0)
    # A bag of an embedding table is a segmented sum, and torch's quickest on a CPU: one thread a segment, in order.
    order = torch.arange(len(x), device=x.device) if order is None else order.long()
    x, offsets = x.contiguous(), offsets.long()
    if len(x) <= _LONG or offsets.diff().amax() <= _LONG:
        return _bags(order, x, offsets)
    # Summed sequentially in fp32, the roundings of a long segment add up: its chunks first, then their sums.
    chunks = torch.cat([offsets, torch.arange(0, len(x), _LONG, device=x.device)]).unique()
    return segment_sum(_bags(order, x, chunks), torch.searchsorted(chunks, offsets))


def _bags(order: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return F.embedding_bag(order, x, offsets, mode="sum", include_last_offset=True)


def segment_mean(x: torch.Tensor, offsets: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """Means, zero for an empty segment."""
    return segment_sum(x, offsets, order) / offsets.diff().clamp_min(1)[:, None]


def segment_max(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Column-wise maxima of the rows in each segment, `[C, W]`; zero for an empty one."""
    positions = torch.arange(len(x), device=x.device)
    return F.embedding_bag(positions, x.contiguous(), offsets.long(), mode="max", include_last_offset=True)


def tiles_of_segments(offsets: torch.Tensor, max_rows: int) -> list[tuple[slice, slice]]:
    """The segments in tiles of at most `max_rows` rows, or of one segment that has more: (rows, segments) of each tile. Reads the
    offsets."""
    bounds = offsets.tolist()
    tiles, first = [], 0
    for last in range(1, len(bounds)):
        if last + 1 == len(bounds) or bounds[last + 1] - bounds[first] > max_rows:
            tiles.append((slice(bounds[first], bounds[last]), slice(first, last)))
            first = last
    return tiles
