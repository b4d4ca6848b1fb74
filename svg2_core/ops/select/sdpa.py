"""Both rules of selection for the sdpa backend: as in reference.py, the rule of errors without sorting all pairs."""

import torch

from . import reference

select_by_mass = reference.select_by_mass


def select_by_error(q_clusters, k_clusters, moments, density, scale, dropped):
    return reference.select_by_error(q_clusters, k_clusters, moments, density, scale, dropped, prefix=within_budget)


def within_budget(worth: torch.Tensor, pairs: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """As reference.within_budget: counts by the leading bits of the worth, then sorts the one bucket where the budget ends."""
    # The bits of floats of one sign are ordered as they are. The negative ones, below all others, are to be in bucket 0.
    bucket = (worth.clamp_min(0.0).view(torch.int32) >> 15).long()
    held = torch.bincount(bucket, weights=pairs, minlength=2**16)
    cumulative = held.flip(0).cumsum(0).flip(0)  # by this bucket and those above
    edge = (cumulative > budget).sum() - 1  # the highest bucket that does not fit whole; -1: all do
    chosen = bucket > edge
    in_edge = (bucket == edge).nonzero()[:, 0]
    in_edge = in_edge[worth[in_edge].argsort(descending=True, stable=True)]
    used = torch.where(chosen, pairs, 0.0).sum()
    chosen[in_edge] = used + pairs[in_edge].cumsum(0) <= budget
    return chosen
