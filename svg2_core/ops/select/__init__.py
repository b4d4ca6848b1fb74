"""Selection of the pairs of query and key clusters that are computed exactly: by their mass (the paper), or by the error of leaving them out."""

import math

import torch

from ..implementations import implementation
from ..kmeans import Clusters
from ..moments import Moments


def select_by_mass(
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
        raise ValueError(f"select_by_mass: top_p must be above 0, got {top_p}")
    if not 0 <= min_k_ratio <= 1:
        raise ValueError(f"select_by_mass: min_k_ratio must be from 0 to 1, got {min_k_ratio}")
    # Less a rounding error: 0.07 of 100 clusters are 7, not 8.
    least = math.ceil(min_k_ratio * k_clusters.centroids.shape[2] - 1e-6)
    return implementation(__name__, backend).select_by_mass(
        q_clusters.centroids, k_clusters.centroids, k_clusters.sizes, top_p, least, scale
    )


def select_by_error(
    q_clusters: Clusters,
    k_clusters: Clusters,
    moments: Moments,
    *,
    density: float,
    scale: float,
    dropped: bool = False,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the pairs that are worth most per key, to a density: -> (bool `[B, H, Cq, Ck]`, expected error fp32 `[B, H]`).

    With p the mass of a pair at its query centroid, log_mass in it, normalised over the key clusters of n keys each, a pair
    is worth p * variance * spread / n per key: what its stand-in would get wrong. The worthiest pairs of a head are taken
    in descending order, as many as leave the pairs of tokens within `density` of all of the head's; ties go to the lower pair. So one
    threshold serves a head, and a head does not depend on others. `density >= 1` selects every pair of non-empty clusters
    by rule. Empty clusters are never selected.
    dropped: nothing will stand in for what is skipped. A pair is then worth p / n, and each query cluster takes at least the
    pair that is worth most to it, whatever the density.

    Expected error: root mean square, over the head's queries, of what the skipped pairs' values vary by, weighted by their
    mass: sqrt(mean over queries of sum over skipped pairs of (p * sqrt(min(variance, 1)) * spread)^2); with `dropped`, of
    their mass times the size of their values. Absolute, in the values' units: a ranking of calls, not a bound.

    All in fp32, pairs counted in fp64. Raises ValueError if density <= 0.
    Source: this project.
    """
    if not density > 0:
        raise ValueError(f"select_by_error: density must be above 0, got {density}")
    return implementation(__name__, backend).select_by_error(
        q_clusters, k_clusters, moments, density, scale, dropped
    )
