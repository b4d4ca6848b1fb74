"""Which pairs of query and key clusters are computed."""

import math

import torch

from .. import registry
from ..kmeans import Clusters


def block_map(
    q_clusters: Clusters,
    k_clusters: Clusters,
    *,
    top_p: float,
    min_k_ratio: float,
    scale: float,
    backend: str = "torch",
) -> torch.Tensor:
    """Select key clusters for each query cluster: bool `[B, H, Cq, Ck]`, True where the pair is computed.

    The centroids' scores s = scale * q.k estimate the attention mass of a key cluster of n keys as n * exp(s), normalised
    over all clusters. Each query cluster takes its heaviest key clusters until their mass reaches `top_p` (the one that
    crosses it included), and at least `ceil(min_k_ratio * Ck)` of them. `top_p >= 1` selects every non-empty key cluster
    by rule. Empty key clusters are never selected; rows of empty query clusters are as if they had their centroid.
    All in fp32; ties go to the lower cluster.

    Raises ValueError if top_p <= 0 or min_k_ratio is outside 0..1.
    Source: SVG2 (arXiv 2505.18875), section 4.2.
    """
    if not top_p > 0:
        raise ValueError(f"block_map: top_p must be above 0, got {top_p}")
    if not 0 <= min_k_ratio <= 1:
        raise ValueError(f"block_map: min_k_ratio must be from 0 to 1, got {min_k_ratio}")
    # Less a rounding error: 0.07 of 100 clusters are 7, not 8.
    least = math.ceil(min_k_ratio * k_clusters.centroids.shape[2] - 1e-6)
    return registry.implementation(__name__, backend).block_map(
        q_clusters.centroids, k_clusters.centroids, k_clusters.sizes, top_p, least, scale
    )
