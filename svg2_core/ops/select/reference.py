"""Both rules in plain torch, one head at a time: the definition that kernels are tested against."""

import torch

from ...precision import widest


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
    nonempty = k_sizes > 0
    if top_p >= 1:
        return nonempty[:, :, None, :].expand(b, h, c_q, c_k).contiguous()
    selected = torch.empty(b, h, c_q, c_k, dtype=torch.bool, device=q_centroids.device)
    for i in range(b):
        for j in range(h):
            # log(0) = -inf gives an empty cluster no mass.
            logits = scale * (q_centroids[i, j] @ k_centroids[i, j].T) + k_sizes[i, j].float().log()
            # Ranked by score, not by mass: masses that underflow to zero would tie with empty clusters.
            logits, rank = logits.sort(dim=-1, descending=True, stable=True)
            mass = logits.softmax(-1)
            before = mass.cumsum(-1) - mass  # mass already gathered when a cluster's turn comes
            keep = before < top_p
            keep[:, :least] = True
            keep[:, 0] = True
            selected[i, j] = torch.zeros_like(keep).scatter_(-1, rank, keep) & nonempty[i, j]
    return selected


def within_budget(worth: torch.Tensor, pairs: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Of entries `[M]`, worthiest first and ties in their order, those whose `pairs` (fp64) add up to `budget` at most."""
    order = worth.argsort(descending=True, stable=True)
    within = torch.empty_like(worth, dtype=torch.bool)
    within[order] = pairs[order].cumsum(0) <= budget
    return within


def select_by_error(q_clusters, k_clusters, moments, density, scale, dropped, prefix=within_budget):
    b, h, c_q, c_k = moments.log_mass.shape
    selected = torch.empty(b, h, c_q, c_k, dtype=torch.bool, device=moments.log_mass.device)
    error = torch.empty(b, h, dtype=torch.float32, device=selected.device)
    for i in range(b):
        for j in range(h):
            q_sizes, k_sizes = q_clusters.sizes[i, j], k_clusters.sizes[i, j]
            logits = scale * (q_clusters.centroids[i, j] @ k_clusters.centroids[i, j].T) + k_sizes.float().log()
            mass = (logits + moments.log_mass[i, j]).softmax(-1)
            if dropped:
                loss, worth = mass * moments.values[i, j].norm(dim=-1), mass / k_sizes.clamp_min(1)
            else:
                loss = mass * moments.variance[i, j].clamp_max(1).sqrt() * moments.spread[i, j]
                worth = mass * moments.variance[i, j] * moments.spread[i, j] / k_sizes.clamp_min(1)
            there = (q_sizes > 0)[:, None] & (k_sizes > 0)
            selected[i, j] = (
                there if density >= 1 else _worthiest(worth, there, q_sizes, k_sizes, density, dropped, prefix)
            )
            skipped = torch.where(there & ~selected[i, j], loss, 0.0)
            weight = q_sizes.float() / q_sizes.sum()
            error[i, j] = (weight @ skipped.square()).sum().sqrt()
    return selected, error


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
