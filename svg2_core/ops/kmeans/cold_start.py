"""Seed tokens of a cold start of k-means: the same on every device and in every batch."""

import torch


def cold_start(x: torch.Tensor, n_clusters: int, *, seed: int, role: int, first_head: int) -> torch.Tensor:
    """Seed tokens of `x` `[B, H, N, D]` as centroids, fp32 `[B, H, C, D]`."""
    b, h, n, d = x.shape
    index = seed_tokens(n, n_clusters, seed, role, first_head, h, x.device)
    return x.gather(2, index[None, :, :, None].expand(b, h, n_clusters, d)).float()


def seed_tokens(
    n: int, n_clusters: int, seed: int, role: int, first_head: int, heads: int, device: torch.device
) -> torch.Tensor:
    """Distinct token indices of each head, int64 `[H, C]`: one hashed position in each of C equal segments of the sequence."""
    bounds = torch.arange(n_clusters + 1, device=device) * n // n_clusters
    key = bounds[:-1]
    for salt in (seed, role, torch.arange(first_head, first_head + heads, device=device)[:, None], n, n_clusters):
        key = _mix(key + (salt * 0x9E3779B9 & 0xFFFFFFFF) & 0xFFFFFFFF)
    return bounds[:-1] + key % bounds.diff()


def _mix(h: torch.Tensor) -> torch.Tensor:
    """A 32-bit finaliser (murmur3's constants) in int64 arithmetic, whose overflow wraps the same on every device."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)
