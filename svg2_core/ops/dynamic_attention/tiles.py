"""What the GPU launchers share: query tiles of two heights, text queries, and the form of a tail."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import Tail


@dataclass(frozen=True)
class Launch:
    """Query tiles of one height. ends: int32 `[B, H, Cq]`, tiles of the clusters up to and including each; most: a bound
    of their number from shapes alone; rest: these are the last rows of clusters, after their whole high tiles."""

    rows: int
    ends: torch.Tensor
    most: int
    rest: bool


def launches(sizes: torch.Tensor, video_len: int, high: int, low: int) -> Iterator[Launch]:
    """For query clusters of these sizes `[B, H, Cq]`: whole tiles of a cluster are high; what is left of it takes a low
    tile if it fits, else a high one."""
    rest = sizes % high
    fits_low = (rest > 0) & (rest <= low)
    for rows, counts, most, is_rest in (
        (high, sizes // high + (rest > low), -(-video_len // high) + sizes.shape[-1], False),
        (low, fits_low, sizes.shape[-1], True),
    ):
        yield Launch(rows, counts.cumsum(-1, dtype=torch.int32), most, is_rest)


def in_precision(tail: Tail, dtype: torch.dtype) -> Tail:
    """Virtual keys and values in the inputs' precision, as all other keys and values are."""
    return tail._replace(keys=tail.keys.to(dtype).contiguous(), values=tail.values.to(dtype).contiguous())


def text_queries(q, k, v, out, layout, scale) -> None:
    """Text queries attend to every key: torch's own attention serves them."""
    mask = None
    if layout.text_bias is not None and layout.video_len < q.shape[2]:
        bias = layout.text_bias.float()[:, None, None]
        mask = q.new_zeros(q.shape[0], 1, 1, q.shape[2])
        mask[..., : layout.video_start] = bias[..., : layout.video_start]
        mask[..., layout.video.stop :] = bias[..., layout.video_start :]
    for part in (slice(0, layout.video_start), slice(layout.video.stop, q.shape[2])):
        if part.start < part.stop:
            out[:, :, part] = F.scaled_dot_product_attention(q[:, :, part], k, v, attn_mask=mask, scale=scale)


def longest_first(offsets: torch.Tensor, cost: torch.Tensor, video_len: int, high: int, low: int) -> torch.Tensor:
    """The query tiles of all clusters as one list for programs that take them in turn: int32 `[most, 4]` of (row, cluster,
    first place in the cluster order, query rows), padded with zeros; `most` is a bound from shapes alone.

    offsets `[rows, Cq + 1]`; cost `[rows, Cq]`, of a high tile of each cluster: a low one takes half as long. Within a row
    the longest come first; rows stay apart, for the keys and values of one fit in the GPU's L2 cache and those of all do not.
    """
    rows, c_q = cost.shape
    sizes = offsets.diff(dim=-1)
    rest = sizes % high
    fits_low = (rest > 0) & (rest <= low)
    counts = torch.cat([sizes // high + (rest > low), fits_low.int()], -1)
    longest = torch.cat([2 * cost, cost], -1).argsort(dim=-1, descending=True, stable=True)
    counts = counts.gather(-1, longest).flatten()
    ends = counts.cumsum(0, dtype=torch.int32)
    number = torch.arange(rows * (video_len // high + c_q), dtype=torch.int32, device=cost.device)
    entry = torch.searchsorted(ends, number, right=True)
    there = entry < len(ends)
    entry = entry.clamp_max(len(ends) - 1)
    row, which = entry // (2 * c_q), longest.flatten()[entry]
    cluster = which % c_q
    place = row * c_q + cluster
    size = sizes.flatten()[place]
    first = torch.where(which < c_q, (number - ends[entry] + counts[entry]) * high, size // high * high)
    begin = offsets[:, :-1].flatten()[place] + first
    items = torch.stack([row, cluster, begin, (size - first).clamp_max(high)], -1)
    return torch.where(there[:, None], items, 0).int()
