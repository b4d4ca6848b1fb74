"""Step 1 of a call: clusters of queries and keys, in the metric of the logits or in the tokens' own space."""

import torch

from .cache import Centroids
from .config import SVG2Config
from .ops.kmeans import Clusters, cluster_means, kmeans
from .ops.kmeans.metric import Space, centre, finite, project, spaces

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

    A row with a past takes few iterations, the others start cold. The clusters' centroids are means of the tokens themselves;
    those of the past lie in the space in which clusters are made.
    """
    counts = config.cluster_counts(q.shape[2])
    rank = min(config.metric_directions, q.shape[3])
    rows = [_in_spaces(q[i], k[i], past, rank, scale) if rank else [(None, None)] * 2 for i, past in enumerate(warm)]
    found, past = [], []
    for role, (x, n_clusters) in enumerate(zip((q, k), counts, strict=True)):
        points = torch.stack([row[role][1] for row in rows]) if rank else x
        starts = [_start(w, role, points, n_clusters, row[role][0]) for w, row in zip(warm, rows, strict=True)]
        groups = _kmeans(points, n_clusters, starts, config, role, first_head, backend)
        past.append(groups.centroids)
        if rank:
            # A token that is not finite shows in its own answer; it must not spoil those of its cluster.
            groups = groups._replace(centroids=finite(cluster_means(x, groups, backend=backend)))
        found.append(groups)
    projections = [[heads and torch.stack([space.projection for space in heads]) for heads, _ in row] for row in rows]
    return *found, [Centroids.pack(past[0][i], past[1][i], *projections[i]) for i in range(len(q))]


def _in_spaces(q, k, past: Centroids | None, rank: int, scale: float):
    """Of one row's heads `[H, N, D]`, for queries and for keys: the heads' spaces, and the tokens there `[H, N, W]`. The spaces
    are made anew at each call: what the model looks for changes as the noise goes."""
    known = None if past is None else past.projections_for(q, rank)
    heads = []
    for j in range(len(q)):
        centred = centre(q[j]), centre(k[j])
        found = spaces(*centred, rank, scale, known and (known[0][j], known[1][j]))
        heads.append([(space, project(x, space.projection)) for x, space in zip(centred, found, strict=True)])
    return [([head[role][0] for head in heads], torch.stack([head[role][1] for head in heads])) for role in (0, 1)]


def _start(past: Centroids | None, role: int, points: torch.Tensor, n_clusters: int, heads: list[Space] | None):
    """The past's centroids where they are now, fp32, if they are of this number and in the space of points `[B, H, N, W]`."""
    if past is None:
        return None
    centroids = (past.q, past.k)[role].float()
    if centroids.shape != (points.shape[1], n_clusters, points.shape[3]):
        return None
    if heads is None:
        return centroids if past.q_projection is None else None
    if heads[0].transfer is None:
        return None
    return torch.stack([c @ space.transfer for c, space in zip(centroids, heads, strict=True)])


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
        return run(x, torch.stack(starts))
    rows = [run(x[i : i + 1], None if start is None else start[None]) for i, start in enumerate(starts)]
    return Clusters(*(torch.cat(field) for field in zip(*rows, strict=True)))
