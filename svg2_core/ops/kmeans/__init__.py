"""Batched Euclidean k-means over the tokens of each head."""

from typing import NamedTuple

import torch

from .. import registry
from .cold_start import cold_start


class Clusters(NamedTuple):
    """A partition of N tokens into C clusters, for each batch row and head.

    order: int32 `[B, H, N]`, token indices grouped by cluster, ascending within a cluster.
    offsets: int32 `[B, H, C + 1]`; cluster c's tokens are `order[offsets[c]:offsets[c + 1]]`. Clusters may be empty.
    centroids: fp32 `[B, H, C, D]`, the means of exactly these tokens; an empty cluster keeps its last centroid.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    centroids: torch.Tensor

    @property
    def sizes(self) -> torch.Tensor:
        """Tokens per cluster, int32 `[B, H, C]`."""
        return self.offsets.diff(dim=-1)


def kmeans(
    x: torch.Tensor,
    n_clusters: int,
    *,
    iterations: int,
    init: torch.Tensor | None = None,
    seed: int = 0,
    role: int = 0,
    first_head: int = 0,
    backend: str = "torch",
) -> Clusters:
    """Cluster `x` `[B, H, N, D]` (any float dtype, any strides) into `n_clusters` groups per row and head.

    Runs exactly `iterations` rounds of assignment and update. Distances are Euclidean: products in the input's
    precision with fp32 accumulation, norms, sums and means in fp32. A row's result depends on that row alone.

    init: centroids to start from, `[B, H, C, D]`; None seeds a cold start with `n_clusters` distinct tokens, one from
        each of as many equal stretches of the sequence, picked by a hash of (seed, head, role, N, C).
    role: 0 for queries, 1 for keys; first_head: index of x's first head in the model, when heads come in chunks.

    Raises ValueError for shapes that do not fit, more clusters than tokens, or fewer than one iteration.
    Source: SVG2 (arXiv 2505.18875), section 4.1.
    """
    if x.dim() != 4:
        raise ValueError(f"kmeans: x must be [B, H, N, D], got {list(x.shape)}")
    b, h, n, d = x.shape
    if not 1 <= n_clusters <= n:
        raise ValueError(f"kmeans: {n_clusters} clusters for {n} tokens; it takes 1 to {n}")
    if iterations < 1:
        raise ValueError(f"kmeans: iterations must be at least 1, got {iterations}")
    if init is not None and init.shape != (b, h, n_clusters, d):
        raise ValueError(f"kmeans: init must be {[b, h, n_clusters, d]}, got {list(init.shape)}")
    if init is None:
        init = cold_start(x, n_clusters, seed=seed, role=role, first_head=first_head)
    return Clusters(*registry.implementation(__name__, backend).lloyd(x, init, iterations))


def cluster_means(values: torch.Tensor, clusters: Clusters, *, backend: str = "torch") -> torch.Tensor:
    """Mean of `values` `[B, H, N, D]` over each cluster's tokens, fp32 `[B, H, C, D]`; zeros for an empty cluster.

    Raises ValueError if values and clusters disagree in B, H or N.
    """
    if values.shape[:3] != clusters.order.shape:
        raise ValueError(f"cluster_means: values {list(values.shape)} do not fit clusters of {list(clusters.order.shape)}")
    return registry.implementation(__name__, backend).cluster_means(values, clusters.order, clusters.offsets)
