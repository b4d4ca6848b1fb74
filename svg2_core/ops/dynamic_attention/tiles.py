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
