"""Step 1 of a call: clusters of queries and keys, in the metric of the logits or in the tokens' own space."""

import torch

from .cache import Centroids
from .config import SVG2Config
from .ops.kmeans import Clusters, kmeans, kmeans_in, logit_spaces


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
    has_past = [w is not None for w in warm]
    if any(has_past) and not all(has_past):  # they take different numbers of iterations
        of = {"scale": scale, "first_head": first_head, "backend": backend}
        rows = [cluster(q[i : i + 1], k[i : i + 1], [w], config, **of) for i, w in enumerate(warm)]
        groups = (Clusters(*(torch.cat(x) for x in zip(*(row[role] for row in rows), strict=True))) for role in (0, 1))
        return *groups, [row[2][0] for row in rows]

    rank = 0 if config.selects_all else min(config.metric_directions, q.shape[3])  # where all pairs are computed any clusters serve
    starts, past = _past(warm, q, config.cluster_counts(q.shape[2]), rank)
    spaces = (None, None)
    if rank:  # made anew at each call: what the model looks for changes as the noise goes
        spaces = logit_spaces(q, k, rank=rank, scale=scale, past=past, backend=backend)
    found, points = [], []
    for role, (x, n_clusters, space) in enumerate(zip((q, k), config.cluster_counts(q.shape[2]), spaces, strict=True)):
        run = {
            "init": starts[role], "iterations": config.kmeans_init_iters if starts[role] is None else config.kmeans_iters,
            "seed": config.seed, "role": role, "first_head": first_head, "backend": backend,
        }  # fmt: skip
        if space is None:
            groups = kmeans(x, n_clusters, **run)
            points.append(groups.centroids)
        else:
            groups, there = kmeans_in(x, space, n_clusters, **run)
            points.append(there)
        found.append(groups)
    kept = [*points, *(space.projection for space in spaces if space is not None)]
    return *found, Centroids.pack(*kept)


def _past(
    warm: list[Centroids | None], x: torch.Tensor, counts: tuple[int, int], rank: int
) -> tuple[list[torch.Tensor | None], tuple[torch.Tensor, torch.Tensor] | None]:
    """What all rows carry on, stacked: centroids of queries and of keys `[B, H, C, W]`, None for those of another number; and where
    there is a metric the projections `[B, H, D, W]`. Of another way to cluster nothing is carried on."""
    h, d = x.shape[1], x.shape[3]

    def stacked(name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        rows = [getattr(w, name) for w in warm]
        if any(row is None or row.shape != shape for row in rows):
            return None
        return torch.stack(rows) if len(rows) > 1 else rows[0][None]

    if warm[0] is None:
        return [None, None], None
    projections = tuple(stacked(name, (h, d, rank)) for name in ("q_projection", "k_projection"))
    of_this_way = all(x is not None for x in projections) if rank else all(w.q_projection is None for w in warm)
    if not of_this_way:
        return [None, None], None
    return [stacked(name, (h, count, rank or d)) for name, count in zip("qk", counts, strict=True)], projections if rank else None
