"""Inputs the tests share: ragged partitions, tensors in awkward memory, data with clusters in it."""

import os

import brute_force
import torch
from svg2_pack.svg2_core.ops.kmeans import Clusters


def sized(backend: str, usual, small):
    """`usual`; or `small` where Triton's interpreter does the work, whose time goes by programs, rounds and operations."""
    return small if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1" else usual


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged_labels(g: torch.Generator, b: int, h: int, n: int, clusters: int) -> torch.Tensor:
    """`[B, H, N]`: one huge cluster, one of a single token, one (or more) empty, the rest random; needs 4 clusters."""
    labels = torch.empty(b, h, n, dtype=torch.int64)
    for i in range(b):
        for j in range(h):
            huge, single, _empty, *rest = torch.randperm(clusters, generator=g).tolist()
            rest = torch.tensor(rest)
            row = rest[torch.randint(len(rest), (n,), generator=g)]
            row[torch.rand(n, generator=g) < 0.5] = huge
            row[torch.randint(n, (1,), generator=g)] = single
            labels[i, j] = row
    return labels


def clusters_of(labels: torch.Tensor, n_clusters: int, x: torch.Tensor | None = None) -> Clusters:
    """The Clusters contract from labels, by lists. Centroids are the means of `x`, or 1-wide zeros without it."""
    orders, offsets, centroids = [], [], []
    for i, row in enumerate(labels):
        for j, head in enumerate(row):
            members = [[t for t, label in enumerate(head.tolist()) if label == c] for c in range(n_clusters)]
            orders.append([t for group in members for t in group])
            offsets.append([sum(map(len, members[:c])) for c in range(n_clusters + 1)])
            centroids.append(torch.zeros(n_clusters, 1) if x is None else brute_force.means(x[i, j], head, n_clusters))
    b, h, _ = labels.shape
    return Clusters(
        torch.tensor(orders, dtype=torch.int32, device=labels.device).view(b, h, -1),
        torch.tensor(offsets, dtype=torch.int32, device=labels.device).view(b, h, -1),
        torch.stack(centroids).float().to(labels.device).unflatten(0, (b, h)),
    )


def labels_of(clusters: Clusters) -> torch.Tensor:
    """`[B, H, N]` int64: the cluster of each token, by lists."""
    b, h, n = clusters.order.shape
    labels = torch.full((b, h, n), -1)
    for i in range(b):
        for j in range(h):
            bounds = clusters.offsets[i, j].tolist()
            order = clusters.order[i, j].tolist()
            for c in range(len(bounds) - 1):
                for token in order[bounds[c] : bounds[c + 1]]:
                    labels[i, j, token] = c
    return labels.to(clusters.order.device)


def random_map(g: torch.Generator, q_labels, k_labels, c_q: int, c_k: int) -> torch.Tensor:
    """bool `[B, H, Cq, Ck]`, about a third True, every row with a non-empty key cluster, one row with all of them."""
    b, h, _ = q_labels.shape
    selected = torch.rand(b, h, c_q, c_k, generator=g) < 0.35
    for i in range(b):
        for j in range(h):
            present = k_labels[i, j].unique().cpu()
            selected[i, j, torch.arange(c_q), present[torch.randint(len(present), (c_q,), generator=g)]] = True
            full = q_labels[i, j, 0]
            selected[i, j, full] = True
    return selected


def _bhnd(x):
    """`[B, H, N, D]` in its own order."""
    return x.clone()


def _bnhd(x):
    """The view of a `[B, N, H * D]` tensor."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(x):
    """One third of a `[B, N, 3 * H * D]` projection, as models that fuse q, k and v make it; the rest is NaN."""
    b, h, n, d = x.shape
    whole = torch.full((b, n, 3, h, d), torch.nan, dtype=x.dtype, device=x.device)
    whole[:, :, 1] = x.transpose(1, 2)
    return whole[:, :, 1].transpose(1, 2)


def _every_second(x):
    """Elements of a head two apart in memory."""
    return x.repeat_interleave(2, -1)[..., ::2]


MEMORY = {"bhnd": _bhnd, "bnhd": _bnhd, "packed": _packed, "every_second": _every_second}


def semantic_qkv(g: torch.Generator, b: int, h: int, n: int, d: int, topics: int = 12):
    """q, k, v `[B, H, N, D]` fp32 with clusters in them: tokens of a topic lie together, queries look for a few topics."""
    topic = torch.randint(topics, (b, h, n), generator=g)
    centres = torch.randn(b, h, topics, 3, d, generator=g) * 1.2
    look = torch.randint(topics, (b, h, topics), generator=g)

    def around(which, kind, spread):
        index = which[..., None].expand(b, h, n, d)
        return centres[..., kind, :].gather(2, index) + spread * torch.randn(b, h, n, d, generator=g)

    k = around(topic, 0, 0.4)
    v = around(topic, 1, 0.6)
    q = around(look.gather(2, topic), 0, 0.5) + 0.5 * around(topic, 2, 0.1)
    return q, k, v
