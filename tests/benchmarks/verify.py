"""Nothing is timed that was not verified: each stage against fp32 arithmetic on a sample of its rows.

Written anew from the definitions, sharing nothing with svg2_core. Raises WrongResult, naming what is wrong.
"""

import math

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


def at_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of `[1, H, N, D]` some rows: `[R]` of all heads, or `[H, R]`, each its own."""
    return x[:, :, rows] if rows.dim() == 1 else x.gather(2, rows[None, :, :, None].expand(1, -1, -1, x.shape[3]))


def dense_rows(q, k, v, rows) -> torch.Tensor:
    """Exact attention of some query rows, fp32 `[1, H, R, D]`."""
    heads, some = [], at_rows(q, rows)
    for head in range(q.shape[1]):
        logits = some[0, head].float() @ k[0, head].float().T * q.shape[-1] ** -0.5
        heads.append(logits.softmax(-1) @ v[0, head].float())
    return torch.stack(heads)[None]


def labels_of(clusters) -> torch.Tensor:
    """Cluster of each token, int64 `[1, H, N]`."""
    sizes = clusters.offsets.diff(dim=-1).long()
    labels = torch.empty_like(clusters.order, dtype=torch.int64)
    for head in range(labels.shape[1]):
        labels[0, head, clusters.order[0, head].long()] = torch.repeat_interleave(sizes[0, head])
    return labels


def pairs_of(q_clusters, k_clusters, selected) -> torch.Tensor:
    """Pairs of video tokens that are selected, fp64 `[1, H]`."""
    q_sizes, k_sizes = (clusters.offsets.diff(dim=-1).double() for clusters in (q_clusters, k_clusters))
    return torch.einsum("bhi,bhij,bhj->bh", q_sizes, selected.double(), k_sizes)


def means_of(x, labels, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of `[N, D]` by label, zero for an empty cluster; and the sizes, at least 1."""
    sizes = torch.bincount(labels, minlength=count).clamp(min=1)
    return x.new_zeros(count, x.shape[1]).index_add(0, labels, x) / sizes[:, None], sizes


def sparse_rows(q, k, v, shape, rows, q_clusters, k_clusters, selected, far=None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a sparse call has to give for some query rows: `[1, H, R, D]`, and the logsumexp of the pairs that are exact, `[1, H, R]`.

    far: (moments, shares of A); what the far field of first order then adds for what is skipped, from its definition."""
    q_labels, k_labels = labels_of(q_clusters), labels_of(k_clusters)
    text, scale, out, masses = shape.text, q.shape[-1] ** -0.5, [], []
    for head in range(q.shape[1]):
        keys, values, some = k[0, head].float(), v[0, head].float(), q[0, head, rows].float()
        logits = some @ keys.T * scale
        video = rows >= text
        clusters = q_labels[0, head, (rows - text).clamp(min=0)]
        chosen = selected[0, head][clusters]  # [rows, Ck]
        chosen[~video] = True
        logits[:, text:].masked_fill_(~chosen[:, k_labels[0, head]], -torch.inf)
        masses.append(logits.logsumexp(-1))
        moved = 0.0
        if far is not None:
            stand_ins, mean_values, matrix = _first_order(some, clusters, keys[text:], values[text:], far[0], head, scale,
                                                          q_clusters, k_labels[0, head], selected[0, head])  # fmt: skip
            weights = torch.cat([logits, stand_ins.masked_fill(chosen, -torch.inf)], 1).softmax(-1)
            moved = far[1][0, head] * weights[:, len(keys) :].sum(1, keepdim=True) * (scale * some @ matrix.T)
            values = torch.cat([values, mean_values])
        else:
            weights = logits.softmax(-1).nan_to_num(0.0)  # nothing to attend to
        out.append(weights @ values + moved)
    return torch.stack(out)[None], torch.stack(masses)[None]


def _first_order(q, clusters, keys, values, known, head: int, scale: float, q_clusters, k_labels, selected):
    """Of one head: stand-ins' logits of queries of these clusters, mean values, and the matrix A `[D, D]`, values by keys."""
    count = selected.shape[1]
    (mean_key, sizes), (mean_value, _) = means_of(keys, k_labels, count), means_of(values, k_labels, count)
    empty = torch.bincount(k_labels, minlength=count) == 0
    centroids, log_mass = q_clusters.centroids[0, head], known.log_mass[0, head]
    z, variances = known.directions[0, head], known.direction_variances[0, head]
    bias = sizes.float().log().masked_fill(empty, -torch.inf) + log_mass
    term = (0.5 * ((q @ z).square() - (centroids @ z).square()[clusters]) @ variances.T).clamp(-2, 2)
    share = (scale * centroids @ mean_key.T + bias).masked_fill(selected, -torch.inf).softmax(-1).nan_to_num(0.0)
    weight = (q_clusters.offsets[0, head].diff().float()[:, None] * share).sum(0)
    weight = weight / weight.sum().clamp(min=1e-30) / sizes
    matrix = ((values - mean_value[k_labels]) * weight[k_labels, None]).T @ (keys - mean_key[k_labels])
    return scale * q @ mean_key.T + bias[clusters] + term, mean_value, matrix


def check_error(name, found, truth, tolerance: float) -> float:
    """Relative L2 error."""
    error = rel_l2(found, truth)
    _require(error <= tolerance, f"{name}: relative error {error:.1e}, more than {tolerance:.1e}")  # NaN fails too
    return error


def check_logsumexp(name, found, truth, tolerance: float) -> None:
    """-inf where there is nothing to attend to; elsewhere within a tolerance, as exp of it weighs."""
    finite = torch.isfinite(truth)
    _require(bool((found[~finite] == -torch.inf).all()), f"{name}: a logsumexp of nothing is not -inf")
    gap = (found - truth)[finite].abs().mean().item() if finite.any() else 0.0
    _require(gap <= tolerance, f"{name}: logsumexp off by {gap:.1e}, more than {tolerance:.1e}")


def check_attention(name, out, truth, rows, tolerance: float) -> float:
    """Relative L2 error of the sampled rows; every element must have been written."""
    _require(bool(torch.isfinite(out).all()), f"{name}: the result has values that are not finite")
    return check_error(name, out[:, :, rows], truth, tolerance)


def _some(count: int, wanted: int = 4) -> range:
    """Of so many heads or clusters, a few."""
    return range(0, count, max(1, count // wanted))


def check_spaces(name, q, k, q_projection, k_projection, scale: float, tolerance: float) -> float:
    """Each projection catches as much variance of the logits as the best one of its rank: -> the worst gap.

    Of keys about their mean in the metric scale^2 E[q q^T]; of queries in that of scale^2 Cov(k)."""
    worst = 0.0
    for head in _some(q.shape[1]):
        queries, keys = (x[0, head].double() for x in (q, k))
        of_q, of_k = (x - x.mean(0) for x in (queries, keys))
        for of, metric, projection in ((of_q, of_k, q_projection), (of_k, queries, k_projection)):
            values, vectors = torch.linalg.eigh(scale**2 * metric.T @ metric / len(metric))
            root = vectors * values.clamp(min=0).sqrt()
            best = torch.linalg.eigvalsh(root.T @ (of.T @ of / len(of)) @ root)[-projection.shape[-1] :].sum()
            found = (of @ projection[0, head].double()).square().sum() / len(of)
            worst = max(worst, abs((found / best).item() - 1))
    _require(worst <= tolerance, f"{name}: {worst:.1%} from the variance that the best directions catch")
    return worst


def check_clusters(name, x, clusters, tolerance: float = 0.02, projection=None) -> float:
    """A permutation; centroids that are means; every token (nearly) at its nearest centroid, in the space of a projection
    where there is one: -> the centroids' error.

    The centroids are means of the very assignment, one update later than those that it was made with: a token may be
    nearer to another one's mean by now, but k-means never raises the sum of squares, which is what is compared.
    """
    labels, worst = labels_of(clusters), 0.0
    for head in _some(x.shape[1]):
        order = clusters.order[0, head].long()
        _require(bool((order.sort().values == torch.arange(len(order), device=x.device)).all()), f"{name}: not a permutation")
        data, filled = x[0, head].float(), clusters.offsets[0, head].diff() > 0
        means, _ = means_of(data, labels[0, head], clusters.centroids.shape[2])
        error = rel_l2(clusters.centroids[0, head][filled], means[filled])
        _require(error <= 1e-2, f"{name}: centroids are not the means of their clusters ({error:.1e})")
        if projection is not None:
            data, means = data @ projection[0, head], means @ projection[0, head]
        own = (data - means[labels[0, head]]).square().sum(-1)
        nearest = torch.cdist(data, means[filled]).square().amin(-1)
        gap = (own.sum() / nearest.sum() - 1).item()
        _require(gap <= tolerance, f"{name}: the assignment is {gap:.1%} worse than the nearest centroids")
        worst = max(worst, error)
    return worst


def check_moments(name, q, k, v, q_clusters, k_clusters, known, scale: float, tolerance: float, sampled: float) -> float:
    """Of a few key clusters, the relative error of each moment: -> the worst one; of directions, which come from a sample of the
    tokens, the variances along them to `sampled`."""
    labels, worst = labels_of(q_clusters), 0.0
    for head in _some(q.shape[1]):
        queries, centroids = q[0, head].float(), q_clusters.centroids[0, head]
        mean, _ = means_of(queries, labels[0, head], len(centroids))
        q_variances = means_of((queries - mean[labels[0, head]]).square(), labels[0, head], len(centroids))[0]
        along = scale * (queries.T @ queries / len(queries)) @ known.directions[0, head]
        offsets, order = k_clusters.offsets[0, head].tolist(), k_clusters.order[0, head].long()
        some = [j for j in _some(len(offsets) - 1, 16) if offsets[j + 1] > offsets[j]]
        found = {field: [] for field in ("values", "log_mass", "variance", "spread", "direction_variances")}
        for j in some:
            of = order[offsets[j] : offsets[j + 1]]
            dk = k[0, head, of].float() - k_clusters.centroids[0, head, j]
            values, logits = v[0, head, of].float(), scale * centroids @ dk.T
            found["values"].append(values.mean(0))
            found["log_mass"].append(logits.logsumexp(1) - math.log(len(of)))
            found["variance"].append(logits.square().mean(1) + scale**2 * q_variances @ dk.square().mean(0))
            found["spread"].append((values - values.mean(0)).square().sum(1).mean().sqrt())
            found["direction_variances"].append((dk @ along).square().mean(0))
        for field, truth in found.items():
            theirs = getattr(known, field)[0, head]
            theirs = theirs[:, some].T if field in ("log_mass", "variance") else theirs[some]
            if field == "direction_variances":
                check_error(f"{name}: {field}", theirs, torch.stack(truth), sampled)
            else:
                worst = max(worst, check_error(f"{name}: {field}", theirs, torch.stack(truth), tolerance))
    return worst


def check_selection(name, q_clusters, k_clusters, known, selected, density: float, scale: float) -> None:
    """As many pairs as the density allows and hardly fewer; none left out that is worth more per key than one that is taken."""
    n = q_clusters.order.shape[2]
    taken = pairs_of(q_clusters, k_clusters, selected)[0]
    for head in _some(selected.shape[1]):
        q_sizes, sizes = (clusters.offsets[0, head].diff().double() for clusters in (q_clusters, k_clusters))
        scores = scale * q_clusters.centroids[0, head].double() @ k_clusters.centroids[0, head].double().T
        mass = (scores + sizes.log() + known.log_mass[0, head]).softmax(-1)
        worth = mass * known.variance[0, head] * known.spread[0, head] / sizes.clamp(min=1)
        real = (q_sizes > 0)[:, None] & (sizes > 0)
        chosen = selected[0, head]
        _require(not bool((chosen & ~real).any()), f"{name}: an empty cluster is selected")
        _require(taken[head].item() <= density * n**2, f"{name}: more pairs than the density allows")
        left = worth.masked_fill(chosen | ~real, -1)
        pairs = (q_sizes[:, None] * sizes)[left >= 0.99 * left.max()]  # the next ones in turn, of which one did not fit
        _require(left.max() < 0 or taken[head].item() + pairs.max().item() > density * n**2, f"{name}: fewer pairs than the density allows")
        least = worth.masked_fill(~chosen, torch.inf).min()
        _require(left.max().item() <= 1.01 * least.item(), f"{name}: a pair that is worth more was left out")
