"""Step 1 of a call: clusters of queries and keys, in the metric of the logits or in the tokens' own space."""

import torch

from .cache import Centroids
from .config import SVG2Config
from .ops.kmeans import Clusters, cluster_means, kmeans
from .ops.kmeans.metric import project, projections

_QUERY, _KEY = 0, 1


def cluster(
    q: torch.Tensor,
    k: torch.Tensor,
    warm: list[Centroids | None],
    config: SVG2Config,
    *,
    scale: float,
    first_head: int,
    backend: str,
) -> tuple[Clusters, Clusters, list[Centroids]]:
    """Cluster video queries and keys `[B, H, N, D]`, each row from its own past: -> their clusters, and the next step's past.

    A row with a past takes few iterations, in the past's projection; the others start cold. The clusters' centroids are means
    of the tokens themselves; those of the past lie in the space in which clusters are made.
    """
    counts = config.cluster_counts(q.shape[2])
    rank = min(config.metric_directions, q.shape[3])
    spaces = (None, None)
    if rank:
        rows = [_projections(q[i], k[i], w, rank, scale) for i, w in enumerate(warm)]
        spaces = tuple(torch.stack(each) for each in zip(*rows, strict=True))  # [B, H, D, rank] of queries, of keys
    found, past = [], []
    for role, (x, space, n_clusters) in enumerate(zip((q, k), spaces, counts, strict=True)):
        points = x if space is None else _project(x, space)
        starts = [_start(w, role, points, n_clusters, rank) for w in warm]
        groups = _kmeans(points, n_clusters, starts, config, role, first_head, backend)
        past.append(groups.centroids)
        if space is not None:
            # A token that is not finite shows in its own answer; it must not spoil those of its cluster.
            groups = groups._replace(centroids=cluster_means(x, groups, backend=backend).nan_to_num(0.0, 0.0, 0.0))
        found.append(groups)
    rows = [Centroids.pack(past[0][i], past[1][i], *(None if s is None else s[i] for s in spaces)) for i in range(len(q))]
    return *found, rows


def _projections(q, k, past: Centroids | None, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one row's heads `[H, N, D]`: what takes queries and keys into their spaces, fp32 `[H, D, rank]` each."""
    known = past and past.projections_for(q, rank)
    if known:
        return known[0].float(), known[1].float()
    heads = [projections(q[j], k[j], rank, scale) for j in range(len(q))]
    return tuple(torch.stack(each) for each in zip(*heads, strict=True))


def _start(past: Centroids | None, role: int, points: torch.Tensor, n_clusters: int, rank: int) -> torch.Tensor | None:
    """The past's centroids, if they are of this number and lie in the space of the points `[B, H, N, W]`."""
    if past is None or bool(rank) != (past.q_projection is not None):
        return None
    centroids = (past.q, past.k)[role]
    return centroids if centroids.shape == (points.shape[1], n_clusters, points.shape[3]) else None


def _project(x: torch.Tensor, space: torch.Tensor) -> torch.Tensor:
    rows = [torch.stack([project(x[i, j], space[i, j]) for j in range(x.shape[1])]) for i in range(len(x))]
    return torch.stack(rows)


def _kmeans(x, n_clusters, starts, config, role, first_head, backend) -> Clusters:
    """Rows that have a start take few iterations, the others start cold."""

    def run(rows: torch.Tensor, init: torch.Tensor | None) -> Clusters:
        iterations = config.kmeans_init_iters if init is None else config.kmeans_iters
        return kmeans(
            rows, n_clusters, iterations=iterations, init=init,
            seed=config.seed, role=role, first_head=first_head, backend=backend,
        )  # fmt: skip

    if all(start is None for start in starts):
        return run(x, None)
    if all(start is not None for start in starts):
        return run(x, torch.stack(starts).float())
    rows = [run(x[i : i + 1], None if start is None else start[None].float()) for i, start in enumerate(starts)]
    return Clusters(*(torch.cat(field) for field in zip(*rows, strict=True)))
