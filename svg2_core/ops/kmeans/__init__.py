"""Batched Euclidean k-means over the tokens of each head."""

from typing import NamedTuple

import torch

from ..implementations import implementation
from .cold_start import cold_start
from .metric import LogitSpace


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
        each of as many equal segments of the sequence, picked by a hash of (seed, head, role, N, C).
    role: 0 for queries, 1 for keys; first_head: index of x's first head in the model, when heads come in chunks.

    Raises ValueError for shapes that do not fit, more clusters than tokens, or fewer than one iteration.
    Source: SVG2 (arXiv 2505.18875), section 4.1.
    """
    if x.dim() != 4:
        raise ValueError(f"kmeans: x must be [B, H, N, D], got {list(x.shape)}")
    b, h, n, d = x.shape
    _check_counts("kmeans", n_clusters, n, iterations)
    if init is not None and init.shape != (b, h, n_clusters, d):
        raise ValueError(f"kmeans: init must be {[b, h, n_clusters, d]}, got {list(init.shape)}")
    if init is None:
        init = cold_start(x, n_clusters, seed=seed, role=role, first_head=first_head)
    return Clusters(*implementation(__name__, backend).lloyd(x, init, iterations))


def _check_counts(name: str, n_clusters: int, n: int, iterations: int) -> None:
    """Raise ValueError, in the name of an operation, for more clusters than tokens or fewer than one iteration."""
    if not 1 <= n_clusters <= n:
        raise ValueError(f"{name}: {n_clusters} clusters for {n} tokens; it takes 1 to {n}")
    if iterations < 1:
        raise ValueError(f"{name}: iterations must be at least 1, got {iterations}")


def logit_spaces(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    rank: int,
    scale: float,
    past: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    backend: str = "torch",
) -> tuple[LogitSpace, LogitSpace]:
    """The spaces in which queries `[B, H, Nq, D]` and keys `[B, H, N, D]` (any float dtype) are clustered: distances there are differences of
    the logits scale * q.k, in the `rank` directions in which they vary most (see metric.py).

    past: the projections of an earlier call, `[B, H, D, rank]` of queries and of keys, or None. A token that is not finite counts as
    zero. Kernels take the statistics over an even sample of the tokens. A head's spaces depend on that head alone.

    Raises ValueError where shapes disagree or rank is outside 1..D.
    Source: this project.
    """
    if q.dim() != 4 or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], *k.shape[3:]):
        raise ValueError(f"logit_spaces: q and k must be [B, H, N, D] of one B, H, D, got {list(q.shape)}, {list(k.shape)}")
    if not 1 <= rank <= q.shape[3]:
        raise ValueError(f"logit_spaces: rank must be from 1 to {q.shape[3]}, got {rank}")
    expected = (*q.shape[:2], q.shape[3], rank)
    if any(x is not None and x.shape != expected for x in past):
        raise ValueError(f"logit_spaces: past must be two of {list(expected)}, got {[x if x is None else list(x.shape) for x in past]}")
    return implementation(__name__, backend).logit_spaces(q, k, rank, scale, past)


def kmeans_in(
    x: torch.Tensor,
    space: LogitSpace,
    n_clusters: int,
    *,
    iterations: int,
    init: torch.Tensor | None = None,
    seed: int = 0,
    role: int = 0,
    first_head: int = 0,
    backend: str = "torch",
) -> tuple[Clusters, torch.Tensor]:
    """Cluster `x` `[B, H, N, D]` by where its tokens lie in a space: -> (clusters, fp32 points `[B, H, C, W]`).

    As `kmeans` of the points (x - mean) projection; init: points of the space that `space.transfer` starts from, or None.
    The clusters' centroids are the means of the tokens themselves, zero for an empty cluster, where a token that is not finite
    counts as zero; the points are the clusters' means in the space, of an empty one its last.

    Raises ValueError for shapes that do not fit, more clusters than tokens, or fewer than one iteration.
    """
    b, h, n, d = x.shape
    w = space.projection.shape[-1]
    if space.projection.shape != (b, h, d, w):
        raise ValueError(f"kmeans_in: a space of {list(space.projection.shape)} does not fit tokens {list(x.shape)}")
    _check_counts("kmeans_in", n_clusters, n, iterations)
    if init is not None and (init.shape != (b, h, n_clusters, w) or space.transfer is None):
        raise ValueError(f"kmeans_in: init must be {[b, h, n_clusters, w]} in the space's past, got {list(init.shape)}")
    order, offsets, means, points = implementation(__name__, backend).lloyd_in(
        x, space, n_clusters, init, iterations, seed, role, first_head
    )
    return Clusters(order, offsets, means), points


def cluster_means(values: torch.Tensor, clusters: Clusters, *, backend: str = "torch") -> torch.Tensor:
    """Mean of `values` `[B, H, N, D]` over each cluster's tokens, fp32 `[B, H, C, D]`; zeros for an empty cluster.

    Raises ValueError if values and clusters disagree in B, H or N.
    """
    if values.shape[:3] != clusters.order.shape:
        raise ValueError(f"cluster_means: values {list(values.shape)} do not fit clusters of {list(clusters.order.shape)}")
    return implementation(__name__, backend).cluster_means(values, clusters.order, clusters.offsets)
