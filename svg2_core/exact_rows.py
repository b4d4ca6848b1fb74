"""A few query rows answered exactly, in every head of every call: they say how far the sparse answer is from the dense one."""

from typing import NamedTuple

import torch

from .layout import Layout
from .ops.kmeans.cold_start import seed_tokens
from .ops.near_field.reference import attend

COUNT = 32  # costs 64 / N of dense attention, and tells a head's error within about a tenth
_ROLE = 2  # of the hash: other places than the clusters' seeds of queries (0) and keys (1)


class ExactRows(NamedTuple):
    """rows: int64 `[H, R]`, indices of video tokens, one in each of R equal stretches; out: their answers, fp32 `[B, H, R, D]`."""

    rows: torch.Tensor
    out: torch.Tensor


def exact_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, *, scale: float, seed: int, first_head: int
) -> ExactRows:
    """Answer a few of the video queries of q, k, v `[B, H, N, D]` by all keys. The places follow from seed, head and length."""
    b, h, n, d = q.shape
    count = min(COUNT, layout.video_len)
    rows = seed_tokens(layout.video_len, count, seed, _ROLE, first_head, h, q.device)
    out = torch.empty(b, h, count, d, dtype=torch.float32, device=q.device)
    text = layout.text_index(n, q.device)
    for i in range(b):
        bias = None
        if layout.text_bias is not None and len(text):
            bias = torch.zeros(n, dtype=torch.float32, device=q.device)
            bias[text] = layout.text_bias[i].float()
        for j in range(h):
            out[i, j] = attend(q[i, j, layout.video][rows[j]], k[i, j], v[i, j], bias, scale)[0]
    return ExactRows(rows, out)


def squared_error(exact: ExactRows, out: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Of a result `[B, H, N, D]` at the exact rows: squared error and squared norm, summed, fp32 `[B, H, 2]`."""
    b, h, r, d = exact.out.shape
    there = out[:, :, layout.video].gather(2, exact.rows[None, :, :, None].expand(b, h, r, d)).float()
    return torch.stack([(there - exact.out).square().sum((2, 3)), exact.out.square().sum((2, 3))], -1)


def foreseen_error(exact: ExactRows, foreseen: torch.Tensor) -> torch.Tensor:
    """A foreseen error per query, fp32 `[B, H]` in the values' units, in the form of `squared_error`."""
    return torch.stack([foreseen.square() * exact.rows.shape[1], exact.out.square().sum((2, 3))], -1)
