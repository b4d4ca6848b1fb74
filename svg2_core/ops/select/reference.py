"""Both rules of selection in plain torch, one head at a time: the definition that kernels are tested against."""

import torch

from ...precision import widest
from ..by_head import by_head


def select_by_mass(
    q_centroids: torch.Tensor,
    k_centroids: torch.Tensor,
    k_sizes: torch.Tensor,
    top_p: float,
    least: int,
    scale: float,
) -> torch.Tensor:
    b, h, c_q, _ = q_centroids.shape
    c_k = k_centroids.shape[2]
    if top_p >= 1:
        return (k_sizes > 0)[:, :, None, :].expand(b, h, c_q, c_k).contiguous()

    def of_head(q_centroids, k_centroids, k_sizes):
        # log(0) = -inf gives an empty cluster no mass.
        logits = scale * (q_centroids @ k_centroids.T) + k_sizes.float().log()
        # Ranked by score, not by mass: masses that underflow to zero would tie with empty clusters.
        logits, rank = logits.sort(dim=-1, descending=True, stable=True)
        mass = logits.softmax(-1)
        before = mass.cumsum(-1) - mass  # exclusive cumulative sum: of the heavier clusters
        keep = before < top_p
        keep[:, :least] = True
        keep[:, 0] = True
        return torch.zeros_like(keep).scatter_(-1, rank, keep) & (k_sizes > 0)

    return by_head(of_head, q_centroids, k_centroids, k_sizes)


def within_budget(worth: torch.Tensor, pairs: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Of entries `[M]`, worthiest first and ties in their order, those whose `pairs` (fp64) add up to `budget` at most."""
    order = worth.argsort(descending=True, stable=True)
    within = torch.empty_like(worth, dtype=torch.bool)
    within[order] = pairs[order].cumsum(0) <= budget
    return within


def select_by_error(q_clusters, k_clusters, moments, density, scale, dropped, prefix=within_budget):
    """prefix: the implementation of the budget, by default that above."""

    def of_head(q_sizes, k_sizes, q_centroids, k_centroids, values, log_mass, variance, spread):
        mass = (scale * (q_centroids @ k_centroids.T) + k_sizes.float().log() + log_mass).softmax(-1)
        if dropped:
            loss, worth = mass * values.norm(dim=-1), mass / k_sizes.clamp_min(1)
        else:
            loss = mass * variance.clamp_max(1).sqrt() * spread
            worth = mass * variance * spread / k_sizes.clamp_min(1)
        filled = (q_sizes > 0)[:, None] & (k_sizes > 0)
        selected = filled if density >= 1 else _worthiest(worth, filled, q_sizes, k_sizes, density, dropped, prefix)
        skipped = torch.where(filled & ~selected, loss, 0.0)
        weight = q_sizes.float() / q_sizes.sum()
        return selected, (weight @ skipped.square()).sum().sqrt()

    return by_head(of_head, q_clusters.sizes, k_clusters.sizes, q_clusters.centroids, k_clusters.centroids, *moments[:4])


def _worthiest(worth, filled, q_sizes, k_sizes, density, one_each, prefix):
    # What is not a number (inputs that overflow) is better computed than represented.
    worth = torch.where(filled, worth.nan_to_num(torch.inf), -1.0)
    wide = widest(worth.device)
    pairs = q_sizes.to(wide)[:, None] * k_sizes.to(wide)
    chosen = torch.zeros_like(filled)
    if one_each:
        chosen.scatter_(1, worth.argmax(1, keepdim=True), True)
        worth = torch.where(chosen, torch.inf, worth)  # they come first, and count
    budget = density * q_sizes.sum().to(wide) * k_sizes.sum().to(wide)
    return (prefix(worth.flatten(), pairs.flatten(), budget).view_as(filled) | chosen) & filled
