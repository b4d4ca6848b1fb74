"""Step 1 of a call: clusters of queries and keys, in the metric of the logits or in the tokens' own space."""

from typing import NamedTuple

import torch

from .cache import Centroids
from .config import SVG2Config
from .ops.kmeans import Clusters, kmeans, kmeans_in, logit_spaces


class Grouped(NamedTuple):
    """What some heads' tokens are grouped into. centroids: for the next step's past, one entry per batch row."""

    queries: Clusters
    keys: Clusters
    centroids: list[Centroids]


def cluster(
    q: torch.Tensor,
    k: torch.Tensor,
    warm: list[Centroids | None],
    config: SVG2Config,
    *,
    scale: float,
    first_head: int,
    backend: str,
    keys: Clusters | None = None,
) -> Grouped:
    """Cluster video queries `[B, H, Nq, D]` and keys `[B, H, N, D]`, each row from its own past.

    A row with a past takes few iterations, the others start cold. The clusters' centroids are means of the tokens themselves;
    those of the past lie in the space in which clusters are made.
    keys: the keys' clusters where they are known already, from other queries over the same keys.
    """
    has_past = [w is not None for w in warm]
    if any(has_past) and not all(has_past):  # they take different numbers of iterations
        rows = [
            cluster(
                q[i : i + 1], k[i : i + 1], [w], config, scale=scale, first_head=first_head, backend=backend,
                keys=keys and Clusters(*(x[i : i + 1] for x in keys)),
            )
            for i, w in enumerate(warm)
        ]  # fmt: skip
        groups = (Clusters(*(torch.cat(x) for x in zip(*(row[role] for row in rows), strict=True))) for role in (0, 1))
        return Grouped(*groups, [row.centroids[0] for row in rows])

    rank = 0 if config.selects_all else min(config.metric_directions, q.shape[3])  # where all pairs are computed any clusters serve
    counts = config.cluster_counts(k.shape[2], q.shape[2])
    starts, past = _past(warm, q, counts, rank)
    spaces = (None, None)
    if rank:  # made anew at each call: what the model looks for changes as the noise goes
        spaces = logit_spaces(q, k, rank=rank, scale=scale, past=past, backend=backend)
    found, centroids = [], []
    for role, x in enumerate((q, k)):
        if role == 1 and keys is not None:
            return Grouped(found[0], keys, Centroids.pack(q=centroids[0], q_projection=spaces[0] and spaces[0].projection))
        run = {
            "init": starts[role], "iterations": config.kmeans_init_iters if starts[role] is None else config.kmeans_iters,
            "seed": config.seed, "role": role, "first_head": first_head, "backend": backend,
        }  # fmt: skip
        if spaces[role] is None:
            groups = kmeans(x, counts[role], **run)
            centroids.append(groups.centroids)
        else:
            groups, points = kmeans_in(x, spaces[role], counts[role], **run)
            centroids.append(points)
        found.append(groups)
    projections = (space and space.projection for space in spaces)
    return Grouped(*found, Centroids.pack(*centroids, *projections))


def _past(
    warm: list[Centroids | None], x: torch.Tensor, counts: tuple[int, int], rank: int
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """What all rows carry on, stacked: centroids of queries and of keys `[B, H, C, W]`, None for those of another number; and where
    there is a metric the projections `[B, H, D, W]`. Of another way to cluster nothing is carried on."""
    h, d = x.shape[1], x.shape[3]

    def stacked(name: str, *shape: int) -> torch.Tensor | None:
        rows = [getattr(w, name) for w in warm]
        if any(row is None or row.shape != shape for row in rows):
            return None
        return torch.stack(rows) if len(rows) > 1 else rows[0][None]

    starts, projections = [None, None], [None, None]
    for role, (name, count) in enumerate(zip("qk", counts, strict=True)):
        if warm[0] is None:
            continue
        projections[role] = stacked(f"{name}_projection", h, d, rank) if rank else None
        if projections[role] is not None if rank else all(getattr(w, f"{name}_projection") is None for w in warm):
            starts[role] = stacked(name, h, count, rank or d)
    return starts, projections
