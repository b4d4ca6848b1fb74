"""One call of the algorithm, read top to bottom like the paper: cluster, map, attend."""

from dataclasses import dataclass

import torch

from .cache import Centroids
from .cluster_picture import Groups
from .config import SVG2Config
from .layout import Layout
from .ops.block_map import block_map
from .ops.dynamic_attention import Tail, dynamic_attention
from .ops.kmeans import Clusters, cluster_means, kmeans
from .ops.workspace import heads_that_fit

_QUERY, _KEY = 0, 1


@dataclass(frozen=True)
class AttentionResult:
    """out `[B, H, N, D]` in q's dtype; density: 0-d fp32 tensor on the device; centroids: one entry per batch row.

    groups: how the tokens were grouped, as far as a picture of it needs.
    """

    out: torch.Tensor
    density: torch.Tensor
    centroids: list[Centroids]
    groups: Groups


def svg2_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    config: SVG2Config,
    warm: list[Centroids | None] | None = None,
    *,
    scale: float | None = None,
    backend: str = "torch",
    heads_at_a_time: int | None = None,
) -> AttentionResult:
    """Sparse attention of q, k, v `[B, H, N, D]` (one float dtype, any strides).

    warm: per batch row, the centroids this row's last call returned, or None for a cold start.
    scale: of the logits; default 1 / sqrt(D). heads_at_a_time: split the call by heads to need less memory.

    Raises ValueError where shapes disagree or a cluster count exceeds the number of video tokens.
    Source: SVG2 (arXiv 2505.18875), algorithm 1; compensation is this project's.
    """
    warm = [None] * q.shape[0] if warm is None else warm
    _check(q, k, v, layout, config, warm, heads_at_a_time)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    step = heads_at_a_time or default_heads(q, layout, config)
    chunks = [slice(first, min(first + step, q.shape[1])) for first in range(0, q.shape[1], step)]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        parts = [_heads(q, k, v, out, layout, config, warm, scale, backend, heads) for heads in chunks]
    shares = [density * (heads.stop - heads.start) / q.shape[1] for (density, *_), heads in zip(parts, chunks, strict=True)]
    rows = zip(*(centroids for _, centroids, _ in parts), strict=True)
    return AttentionResult(
        out=out,
        density=sum(shares[1:], shares[0]),
        centroids=[Centroids(torch.cat([e.q for e in row]), torch.cat([e.k for e in row])) for row in rows],
        groups=Groups.of_chunks([groups for *_, groups in parts]),
    )


def _check(q, k, v, layout, config, warm, heads_at_a_time) -> None:
    """Raise ValueError naming the input that does not fit."""
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, but q is {q.dtype} {list(q.shape)}")
    layout.check(q.shape[2])
    tokens = layout.video_len
    for name, count in zip(("q_clusters", "k_clusters"), config.cluster_counts(tokens), strict=True):
        if count > tokens:
            raise ValueError(f"{name}: {count} clusters for {tokens} video tokens; it takes at most one per token")
    if len(warm) != q.shape[0]:
        raise ValueError(f"warm has {len(warm)} entries for {q.shape[0]} batch rows")
    if heads_at_a_time is not None and heads_at_a_time < 1:
        raise ValueError(f"heads_at_a_time must be at least 1, got {heads_at_a_time}")


def default_heads(q: torch.Tensor, layout: Layout, config: SVG2Config) -> int:
    """How many heads `svg2_attention` takes at a time: on a GPU, as many as the work memory allows."""
    if q.device.type == "cpu":
        return q.shape[1]
    fit = heads_that_fit(layout.video_len, *config.cluster_counts(layout.video_len), q.shape[3], q.shape[0])
    return min(fit, q.shape[1])


def _heads(q, k, v, out, layout, config, warm, scale, backend, heads) -> tuple[torch.Tensor, list[Centroids], Groups]:
    """Answer some heads of the call into their part of `out`; their density, centroids and groups."""
    q, k, v, out = q[:, heads], k[:, heads], v[:, heads], out[:, heads]
    c_q, c_k = config.cluster_counts(layout.video_len)
    video = layout.video

    # 1. Queries and keys are grouped by meaning, each on its own.
    q_groups = _cluster(q[:, :, video], c_q, [w and w.q[heads] for w in warm], config, _QUERY, heads.start, backend)
    k_groups = _cluster(k[:, :, video], c_k, [w and w.k[heads] for w in warm], config, _KEY, heads.start, backend)

    # 2. The centroids' scores say which pairs of groups matter.
    selected = block_map(
        q_groups, k_groups, top_p=config.top_p, min_k_ratio=config.min_k_ratio, scale=scale, backend=backend
    )

    # 3. A skipped key group is represented by its centroid: n keys at one place weigh like one key with logit + log n.
    tail = None
    if config.compensation == "centroid" and config.top_p < 1:
        tail = Tail(
            keys=k_groups.centroids,
            values=cluster_means(v[:, :, video], k_groups, backend=backend),
            biases=k_groups.sizes.float().log(),
        )

    # 4. Exact attention over the selected pairs.
    dynamic_attention(
        q, k, v, q_groups, k_groups, selected, layout=layout, scale=scale, tail=tail, out=out, backend=backend
    )
    centroids = [Centroids.pack(a, b) for a, b in zip(q_groups.centroids, k_groups.centroids, strict=True)]
    return density(q_groups, k_groups, selected, q.shape[2]), centroids, Groups.of(q_groups, k_groups)


def _cluster(x, n_clusters, warm, config, role, first_head, backend) -> Clusters:
    """Cluster each row from its own past: rows that have one take few iterations, the others start cold."""

    def fits(centroids: torch.Tensor | None) -> bool:
        return centroids is not None and centroids.shape == (x.shape[1], n_clusters, x.shape[3])

    def run(rows: torch.Tensor, init: torch.Tensor | None) -> Clusters:
        iterations = config.kmeans_init_iters if init is None else config.kmeans_iters
        return kmeans(
            rows, n_clusters, iterations=iterations, init=init,
            seed=config.seed, role=role, first_head=first_head, backend=backend,
        )  # fmt: skip

    has_past = [fits(w) for w in warm]
    if not any(has_past):
        return run(x, None)
    if all(has_past):
        return run(x, torch.stack(warm).float())
    rows = [run(x[i : i + 1], warm[i][None].float() if has_past[i] else None) for i in range(x.shape[0])]
    return Clusters(*(torch.cat(field) for field in zip(*rows, strict=True)))


def density(q_groups: Clusters, k_groups: Clusters, selected: torch.Tensor, tokens: int) -> torch.Tensor:
    """Query-key pairs computed exactly over all pairs, mean over rows and heads: 0-d fp32 tensor on the device.

    Pairs with a text query or a text key are all exact; stand-ins are not counted.
    """
    video = q_groups.order.shape[-1]
    keys = torch.where(selected, k_groups.sizes[:, :, None], 0).sum(-1)
    # fp64: the count of pairs of 75,600 tokens has more digits than fp32 can tell apart.
    pairs = q_groups.sizes.double() * keys
    return ((pairs.sum(-1).mean() + tokens**2 - video**2) / tokens**2).float()
