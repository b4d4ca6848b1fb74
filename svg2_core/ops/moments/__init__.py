"""Moments of key clusters and of pairs of clusters, without a look at single pairs of tokens."""

from typing import NamedTuple

import torch

from ..implementations import implementation
from ..kmeans import Clusters


class Moments(NamedTuple):
    """Moments of one call, all fp32. Of an empty cluster they are zero. Centroids alone (order 0) need the values only.

    values `[B, H, Ck, D]`: mean value of a key cluster.
    log_mass `[B, H, Cq, Ck]`: log of the mean over a key cluster j of exp(scale * qc.(k - kj)), qc the query centroid and kj
        the key centroid: what the cluster weighs at the query centroid, beyond its size times exp(scale * qc.kj). Never
        below zero but by rounding.
    variance `[B, H, Cq, Ck]`: of the logits within a pair of clusters, of its keys and of its queries and keys together.
    spread `[B, H, Ck]`: root mean square distance of a cluster's values to their mean.
    directions `[B, H, D, M]`: for queries: q.(k - kj) = sum_m (q.z_m)(p_m.(k - kj)), nearly; the M terms that vary most.
    direction_variances `[B, H, Ck, M]`: mean of (scale * p_m.(k - kj))^2 over a key cluster.
    """

    values: torch.Tensor
    log_mass: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    spread: torch.Tensor | None = None
    directions: torch.Tensor | None = None
    direction_variances: torch.Tensor | None = None


def moments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_clusters: Clusters,
    k_clusters: Clusters,
    *,
    scale: float,
    directions: int,
    backend: str = "torch",
) -> Moments:
    """Moments of the clusters of video queries q `[B, H, Nq, D]` and keys k, v `[B, H, N, D]` (one float dtype, any strides).

    directions: M, 0 to D; how many directions the variance within a key cluster is kept in.
    All sums are fp32. A head's moments depend on that head alone.

    Raises ValueError where shapes disagree, or for a count of directions outside 0..D.
    Source: this project (the far field of first order; see far_field).
    """
    if k.shape != v.shape or q.dim() != 4 or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(f"moments: q, k, v must have one shape but for the count of queries, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    for name, clusters, x in (("q_clusters", q_clusters, q), ("k_clusters", k_clusters, k)):
        if clusters.order.shape != x.shape[:3] or clusters.centroids.shape[-1] != q.shape[-1]:
            raise ValueError(f"moments: {name} of {list(clusters.order.shape)} do not fit tokens {list(x.shape)}")
    if not 0 <= directions <= q.shape[-1]:
        raise ValueError(f"moments: directions must be from 0 to {q.shape[-1]}, got {directions}")
    return Moments(*implementation(__name__, backend).moments(q, k, v, q_clusters, k_clusters, scale, directions))
