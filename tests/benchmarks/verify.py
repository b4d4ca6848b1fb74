"""Nothing is timed that was not verified: each stage against fp32 arithmetic on a sample of its rows.

Written anew from the definitions, sharing nothing with svg2_core. Raises WrongResult, naming what is wrong.
"""

import torch

ROWS = 128  # query rows looked at in each head


class WrongResult(Exception):
    pass


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise WrongResult(what)


def sample_rows(shape, device) -> torch.Tensor:
    """Tokens to look at: the first, the last, and others in between, the same in every process."""
    n = shape.tokens
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: ROWS - 2]
    return torch.cat([rows, torch.tensor([0, n - 1])]).unique().to(device)


def rel_l2(out: torch.Tensor, truth: torch.Tensor) -> float:
    return ((out.float() - truth).norm() / truth.norm()).item()


def dense_rows(q, k, v, rows) -> torch.Tensor:
    """Exact attention of some query rows, fp32 `[1, H, rows, D]`."""
    heads = []
    for head in range(q.shape[1]):
        logits = q[0, head, rows].float() @ k[0, head].float().T * q.shape[-1] ** -0.5
        heads.append(logits.softmax(-1) @ v[0, head].float())
    return torch.stack(heads)[None]


def labels_of(clusters) -> torch.Tensor:
    """Cluster of each token, int64 `[1, H, N]`."""
    sizes = clusters.offsets.diff(dim=-1).long()
    labels = torch.empty_like(clusters.order, dtype=torch.int64)
    for head in range(labels.shape[1]):
        labels[0, head, clusters.order[0, head].long()] = torch.repeat_interleave(sizes[0, head])
    return labels


def sparse_rows(q, k, v, shape, rows, q_clusters, k_clusters, selected, compensation) -> torch.Tensor:
    """What a sparse call has to give for some query rows, from its clusters and map."""
    q_labels, k_labels = labels_of(q_clusters), labels_of(k_clusters)
    text, scale, out = shape.text, q.shape[-1] ** -0.5, []
    for head in range(q.shape[1]):
        keys, values = k[0, head].float(), v[0, head].float()
        logits = q[0, head, rows].float() @ keys.T * scale
        video = rows >= text
        chosen = selected[0, head][q_labels[0, head, (rows - text).clamp(min=0)]]  # [rows, Ck]
        chosen[~video] = True
        logits[:, text:].masked_fill_(~chosen[:, k_labels[0, head]], -torch.inf)
        if compensation:
            sizes = torch.bincount(k_labels[0, head], minlength=chosen.shape[1])
            total = keys.new_zeros(chosen.shape[1], keys.shape[1])
            mean_key, mean_value = (
                total.index_add(0, k_labels[0, head], x[text:]) / sizes.clamp(min=1)[:, None] for x in (keys, values)
            )
            stand_in = q[0, head, rows].float() @ mean_key.T * scale + sizes.float().log()
            logits = torch.cat([logits, stand_in.masked_fill(chosen, -torch.inf)], 1)
            values = torch.cat([values, mean_value])
        out.append(logits.softmax(-1) @ values)
    return torch.stack(out)[None]


def check_attention(name, out, truth, rows, tolerance: float) -> float:
    """Relative L2 error of the sampled rows; every element must have been written."""
    _require(bool(torch.isfinite(out).all()), f"{name}: the result has values that are not finite")
    error = rel_l2(out[:, :, rows], truth)
    _require(error <= tolerance, f"{name}: relative error {error:.1e}, more than {tolerance:.1e}")
    return error


def check_clusters(name, x, clusters, tolerance: float = 0.02) -> None:
    """A permutation; centroids that are means; every sampled token (nearly) at its nearest centroid of the round before.

    The centroids are means of the very assignment, one update later than those that it was made with: a token may be
    nearer to another one's mean by now, but k-means never raises the sum of squares, which is what is compared.
    """
    labels = labels_of(clusters)
    for head in range(0, x.shape[1], max(1, x.shape[1] // 4)):
        order = clusters.order[0, head].long()
        _require(bool((order.sort().values == torch.arange(len(order), device=x.device)).all()), f"{name}: not a permutation")
        data, sizes = x[0, head].float(), torch.bincount(labels[0, head], minlength=clusters.centroids.shape[2])
        means = torch.zeros_like(clusters.centroids[0, head]).index_add(0, labels[0, head], data) / sizes.clamp(min=1)[:, None]
        filled = sizes > 0
        error = rel_l2(clusters.centroids[0, head][filled], means[filled])
        _require(error <= 1e-2, f"{name}: centroids are not the means of their clusters ({error:.1e})")
        own = (data - means[labels[0, head]]).square().sum(-1)
        nearest = torch.cdist(data, means[filled]).square().amin(-1)
        gap = (own.sum() / nearest.sum() - 1).item()
        _require(gap <= tolerance, f"{name}: the assignment is {gap:.1%} worse than the nearest centroids")


def check_map(name, q_clusters, k_clusters, selected, top_p: float) -> None:
    """Each query cluster's selected mass reaches top_p and would not without its lightest cluster."""
    sizes = k_clusters.offsets.diff(dim=-1)
    for head in range(0, selected.shape[1], max(1, selected.shape[1] // 4)):
        scores = q_clusters.centroids[0, head] @ k_clusters.centroids[0, head].T * q_clusters.centroids.shape[-1] ** -0.5
        mass = (scores + sizes[0, head].float().log()).softmax(-1)
        taken = torch.where(selected[0, head], mass, 0)
        lightest = torch.where(selected[0, head], mass, torch.inf).amin(-1)
        heaviest_left = torch.where(selected[0, head], 0, mass).amax(-1)
        _require(bool((taken.sum(-1) >= top_p - 1e-3).all()), f"{name}: a row's mass is below top_p")
        one = selected[0, head].sum(-1) == 1
        _require(bool(((taken.sum(-1) - lightest <= top_p + 1e-3) | one).all()), f"{name}: a row takes more than it needs")
        _require(bool((heaviest_left <= lightest * 1.01 + 1e-9).all()), f"{name}: a heavier cluster was left out")
