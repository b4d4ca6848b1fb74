"""The report of a call: its density, and its error against dense attention."""

from typing import NamedTuple

import torch

from ..implementations import implementation
from ..kmeans import Clusters


class Summary(NamedTuple):
    """0-d fp32 tensors on the device. density: pairs of video tokens computed exactly, over all pairs of the call's tokens; error:
    relative L2 error on the exact rows; expected_error: the same as estimated from the moments, None where there is no estimate."""

    density: torch.Tensor
    error: torch.Tensor
    expected_error: torch.Tensor | None


def exact_pairs(q_clusters: Clusters, k_clusters: Clusters, selected: torch.Tensor, *, backend: str = "torch") -> torch.Tensor:
    """Pairs of video tokens that are computed exactly: fp64 `[B, H]` (fp32 on a device without fp64)."""
    return implementation(__name__, backend).exact_pairs(q_clusters, k_clusters, selected)


def summary(
    pairs: torch.Tensor, squares: torch.Tensor, expected_errors: torch.Tensor | None, *, all_pairs: int, rows: int, backend: str = "torch"
) -> Summary:
    """Of all heads of a call, from `exact_pairs`, `squared_error` and select_by_error's expected errors, `[B, H, ...]` each. all_pairs: pairs of
    tokens of a head; rows: exact rows of a head."""
    return Summary(*implementation(__name__, backend).summary(pairs, squares, expected_errors, all_pairs, rows))
