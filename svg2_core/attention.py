"""One call of the algorithm, read top to bottom: cluster, moments, select, near field, far field."""

from dataclasses import dataclass

import torch

from .cache import Centroids
from .cluster_picture import Groups
from .clustering import cluster
from .config import SVG2Config
from .layout import Layout
from .ops.exact_rows import EXACT_ROWS, exact_rows, squared_error
from .ops.far_field import far_field
from .ops.kmeans import Clusters, cluster_means
from .ops.moments import Moments, moments
from .ops.near_field import near_field
from .ops.report import exact_pairs, summary
from .ops.select import select_by_error, select_by_mass
from .ops.workspace import heads_that_fit, work_memory
from .threads import side_by_side

Keys = dict[tuple[int, int], Clusters]  # clusters of keys, by first head and end


@dataclass(frozen=True)
class AttentionResult:
    """One answered call.

    out `[B, H, N, D]` in q's dtype; centroids: one entry per batch row, for the next step's `warm`;
    groups: how the tokens were grouped, as far as a picture of it needs.
    0-d fp32 tensors on the device: density, pairs computed exactly over all pairs; error, the relative L2 error against
    dense attention on a few rows that were answered exactly too; expected_error, an estimate of it from the moments, not
    to scale. The last two are None where the backend or the settings have no such thing.
    text_share: how much of the density is pairs with a text token, all of which are exact.
    keys: the clusters of the keys, by chunk of heads, where the queries were a part of the video: for the other parts.
    """

    out: torch.Tensor
    density: torch.Tensor
    centroids: list[Centroids]
    groups: Groups
    error: torch.Tensor | None = None
    expected_error: torch.Tensor | None = None
    text_share: float = 0.0
    keys: Keys | None = None


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
    first_head: int = 0,
    keys: Keys | None = None,
) -> AttentionResult:
    """Sparse attention of q `[B, H, Nq, D]` over k, v `[B, H, N, D]` (one float dtype, any strides).

    warm: per batch row, the centroids this row's last call returned, or None for a cold start.
    scale: of the logits; default 1 / sqrt(D). heads_at_a_time: split the call by heads to need less memory.
    first_head: number of head 0 in the whole attention, where other devices answer its other heads: the seeds go by it.
    keys: where queries are a part of the video (`layout.queries`), what the call of an earlier part over the same keys returned:
    then the keys are not clustered again, and all else is this part's own. Without it, each part clusters the keys by its own
    queries.

    Raises ValueError where shapes disagree, a cluster count exceeds the number of video tokens, or gradients are asked for.
    Source: SVG2 (arXiv 2505.18875), algorithm 1; the metric, the moments, the rule of errors and the far field are this
    project's.
    """
    warm = [None] * q.shape[0] if warm is None else warm
    _check(q, k, v, layout, config, warm, heads_at_a_time)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    at_a_time = heads_at_a_time or default_heads(q, layout, config, backend)
    head_by_head = backend == "sdpa"  # each head is a call of its own, so that heads can be answered side by side
    step = 1 if head_by_head else at_a_time
    chunks = [slice(first, min(first + step, q.shape[1])) for first in range(0, q.shape[1], step)]

    def answer(heads: slice) -> _ChunkResult:
        return _attend_heads(q, k, v, out, layout, config, warm, scale, backend, heads, first_head, keys and keys.get(_bounds(heads)))

    with torch.cuda.device_of(q):  # Triton launches on the current device
        results = side_by_side(answer, chunks, at_a_time) if head_by_head and q.is_cpu else [answer(heads) for heads in chunks]
    rows = zip(*(result.centroids for result in results), strict=True)
    all_pairs, video = q.shape[2] * k.shape[2], layout.queries_len * layout.video_len
    text_share = (all_pairs - video) / all_pairs
    pairs, squares, expected_errors = (
        _cat_heads([getattr(result, name) for result in results]) for name in ("pairs", "squares", "expected_error")
    )
    found = summary(pairs, squares, expected_errors, all_pairs=all_pairs, rows=min(EXACT_ROWS, layout.queries_len), backend=backend)
    return AttentionResult(
        out=out,
        density=found.density + text_share if text_share else found.density,
        centroids=[Centroids.cat(row) for row in rows],
        groups=Groups.of_chunks([result.groups for result in results]),
        error=found.error,
        expected_error=found.expected_error,
        text_share=text_share,
        keys=None if layout.queries is None else {_bounds(heads): result.keys for heads, result in zip(chunks, results, strict=True)},
    )


def _check(q, k, v, layout, config, warm, heads_at_a_time) -> None:
    """Raise ValueError naming the input that does not fit."""
    for name, x in (("k", k), ("v", v)):
        if (*x.shape[:2], *x.shape[3:]) != (*q.shape[:2], *q.shape[3:]) or x.shape != k.shape or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, but q is {q.dtype} {list(q.shape)} and k {list(k.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("q, k or v asks for gradients, which sparse attention does not have: call it under torch.no_grad()")
    layout.check(q.shape[2], k.shape[2])
    counts = config.cluster_counts(layout.video_len, layout.queries_len)
    for name, count, tokens in zip(("q_clusters", "k_clusters"), counts, (layout.queries_len, layout.video_len), strict=True):
        if count > tokens:
            raise ValueError(f"{name}: {count} clusters for {tokens} video tokens; it takes at most one per token")
    if len(warm) != q.shape[0]:
        raise ValueError(f"warm has {len(warm)} entries for {q.shape[0]} batch rows")
    if heads_at_a_time is not None and heads_at_a_time < 1:
        raise ValueError(f"heads_at_a_time must be at least 1, got {heads_at_a_time}")


def default_heads(q: torch.Tensor, layout: Layout, config: SVG2Config, backend: str) -> int:
    """How many heads `svg2_attention` takes at a time: on a GPU, as many as the work memory allows; with sdpa, one for each of
    a CPU's threads, and one elsewhere."""
    if backend == "sdpa":
        return min(torch.get_num_threads(), q.shape[1]) if q.is_cpu else 1
    if q.is_cpu:
        return q.shape[1]
    rank = min(config.metric_directions, q.shape[3])
    counts = config.cluster_counts(layout.video_len, layout.queries_len)
    return min(heads_that_fit(max(layout.video_len, layout.queries_len), *counts, q.shape[3], rank, q.shape[0], work_memory(q.device)), q.shape[1])


@dataclass(frozen=True)
class _ChunkResult:
    """The results of a chunk of heads. pairs of video tokens computed exactly, fp64 `[B, heads]`; squares: squared error and squared norm
    at the exact rows, fp32 `[B, heads, 2]`; expected_error: fp32 `[B, heads]`."""

    centroids: list[Centroids]
    groups: Groups
    keys: Clusters
    pairs: torch.Tensor
    squares: torch.Tensor
    expected_error: torch.Tensor | None = None


def _attend_heads(q, k, v, out, layout, config, warm, scale, backend, heads, first_head, keys) -> _ChunkResult:
    """Answer some heads of the call into their part of `out`."""
    q, k, v, out = q[:, heads], k[:, heads], v[:, heads], out[:, heads]
    video = [x[:, :, there] for x, there in zip((q, k, v), (layout.video_queries, layout.video, layout.video), strict=True)]

    # 1. Queries and keys are clustered, each on its own.
    warm = [None if w is None else w.of_heads(heads) for w in warm]
    q_groups, k_groups, centroids = cluster(
        *video[:2], warm, config, scale=scale, first_head=first_head + heads.start, backend=backend, keys=keys
    )
    groups, common = Groups.of(q_groups, k_groups), {"scale": scale, "backend": backend}

    # 2. Moments of the clusters and of pairs of clusters, without a look at pairs of tokens.
    known = None
    if config.needs_moments:
        directions = min(config.variance_directions, q.shape[3])
        known = moments(*video, q_groups, k_groups, directions=directions, **common)
    elif config.compensation == "centroid" and not config.selects_all:
        known = Moments(cluster_means(video[2], k_groups, backend=backend))

    # 3. The selection of pairs of clusters to compute exactly.
    expected_error = None
    if config.selects_by_error:
        selected, expected_error = select_by_error(
            q_groups, k_groups, known, density=config.density, dropped=config.compensation == "off", **common
        )
    else:
        top_p = 1.0 if config.selects_all else config.top_p
        selected = select_by_mass(q_groups, k_groups, top_p=top_p, min_k_ratio=config.min_k_ratio, **common)

    # 4. The near field: exact attention over these.
    _, logsumexp = near_field(q, k, v, q_groups, k_groups, selected, layout=layout, out=out, **common)

    # 5. The far field: an approximation of the others, merged by the logsumexp.
    exact = exact_rows(q, k, v, layout, scale=scale, seed=config.seed, first_head=first_head + heads.start, backend=backend)
    if known is not None and config.compensation != "off":
        order = 1 if config.compensation == "first_order" else 0
        far_field(
            q, k, v, out, logsumexp, q_groups, k_groups, known, selected,
            layout=layout, order=order, exact=exact, **common,
        )  # fmt: skip
    squares = squared_error(exact, out, layout, backend=backend)
    return _ChunkResult(centroids, groups, k_groups, exact_pairs(q_groups, k_groups, selected, backend=backend), squares, expected_error)


def _bounds(heads: slice) -> tuple[int, int]:
    return heads.start, heads.stop


def _cat_heads(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Of all heads, from chunks of them in order."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, 1)
