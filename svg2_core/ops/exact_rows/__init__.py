"""Exact answers for a sample of query rows in every head of every call: the error of the sparse answer is measured on them."""

from typing import NamedTuple

import torch

from ...layout import Layout
from ..implementations import implementation

EXACT_ROWS = 32  # costs 64 / N of dense attention, and gives a head's error within about a tenth
ROLE = 2  # of the hash: other tokens than the clusters' seeds of queries (0) and keys (1)


class ExactRows(NamedTuple):
    """rows: int64 `[H, R]`, indices among the video queries, one in each of R equal segments; out: their answers, fp32 `[B, H, R, D]`."""

    rows: torch.Tensor
    out: torch.Tensor


def exact_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    *,
    scale: float,
    seed: int,
    first_head: int,
    backend: str = "torch",
) -> ExactRows:
    """Answer a few of the video queries of q `[B, H, Nq, D]` by all keys k, v `[B, H, N, D]`. Which ones follows from seed, head and length."""
    count = min(EXACT_ROWS, layout.queries_len)
    return ExactRows(*implementation(__name__, backend).exact_rows(q, k, v, layout, scale, seed, first_head, count))


def squared_error(exact: ExactRows, out: torch.Tensor, layout: Layout, *, backend: str = "torch") -> torch.Tensor:
    """Of a result `[B, H, N, D]` at the exact rows: squared error and squared norm, summed, fp32 `[B, H, 2]`."""
    return implementation(__name__, backend).squared_error(exact, out, layout)
