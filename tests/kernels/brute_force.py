"""The operations in fp64 by the shortest way that is obviously right: all pairs at once, nothing shared with svg2_core.

They take labels (the cluster of each token), not orders and offsets, so reading those is tested as well.
"""

import math

import torch


def pairs(q, k, v, q_labels, k_labels, selected, video_start, text_bias=None, tail=None, q_start=None):
    """Sparse attention as a dense one: keys `[B,H,M,D]`, values, and a bias `[B,H,Nq,M]` that is -inf where not computed.

    M is N, plus one virtual key per key cluster if there is a tail. text_bias `[B, N - V]`, tail (keys, values, biases).
    q_start: of the video in q, where that is not as in k.
    """
    b, h, n, _ = k.shape
    clusters = selected.shape[-1]
    q_start = video_start if q_start is None else q_start
    queries = torch.arange(q_start, q_start + q_labels.shape[-1], device=q.device)
    keys = slice(video_start, video_start + k_labels.shape[-1])
    is_text = torch.ones(n, dtype=torch.bool, device=q.device)
    is_text[keys] = False

    bias = torch.zeros(b, h, q.shape[2], n, dtype=torch.float64, device=q.device)
    if text_bias is not None:
        bias[..., is_text] += text_bias[:, None, None, :].double()
    extra = torch.full((b, h, q.shape[2], clusters), -torch.inf, dtype=torch.float64, device=q.device)
    for i in range(b):
        for j in range(h):
            chosen = selected[i, j][q_labels[i, j]]  # [V, Ck]: for each video query, the key clusters it sees
            block = torch.zeros(len(queries), k_labels.shape[-1], dtype=torch.float64, device=q.device)
            block[~chosen[:, k_labels[i, j]]] = -torch.inf
            bias[i, j, queries, keys] = block
            if tail is not None:
                stand_in = tail[2][i, j].double().expand(len(queries), clusters).clone()
                stand_in[chosen] = -torch.inf
                extra[i, j, queries] = stand_in
    if tail is None:
        return k.double(), v.double(), bias
    return (
        torch.cat([k.double(), tail[0].double()], 2),
        torch.cat([v.double(), tail[1].double()], 2),
        torch.cat([bias, extra], -1),
    )


def attention(q, keys, values, bias, scale):
    """softmax(scale * q keys^T + bias) values in fp64."""
    logits = scale * q.double() @ keys.double().transpose(-1, -2) + bias
    return logits.softmax(-1) @ values.double()


def squared_distances(x, centroids):
    """fp64 `[N, C]` from differences, not from products: nothing cancels."""
    return torch.stack([(x.double() - c.double()).square().sum(-1) for c in centroids], -1)


def means(x, labels, n_clusters):
    """fp64 `[C, D]`, zeros for an empty cluster."""
    out = torch.zeros(n_clusters, x.shape[-1], dtype=torch.float64, device=x.device)
    for c in labels.unique().tolist():
        out[c] = x[labels == c].double().mean(0)
    return out


def lloyd(x, init, iterations):
    """Plain k-means of one head in fp64: labels and centroids after `iterations` rounds."""
    centroids = init.double().clone()
    for _ in range(iterations):
        labels = squared_distances(x, centroids).argmin(-1)
        for c in labels.unique().tolist():
            centroids[c] = x[labels == c].double().mean(0)
    return labels, centroids


def inertia(x, labels, centroids):
    """Sum of squared distances of the tokens to their own centroid, fp64."""
    return (x.double() - centroids.double()[labels]).square().sum().item()


def top_p(q_centroids, k_centroids, sizes, p, least, scale):
    """The map of one head, row by row: `selected` bool `[Cq, Ck]` and `margin` `[Cq]`.

    margin: how far a row's outcome is from another one, in mass for the threshold and in score for the ranking. Where it
    is tiny, rounding may rightly decide.
    """
    selected = torch.zeros(len(q_centroids), len(k_centroids), dtype=torch.bool)
    margin = torch.zeros(len(q_centroids))
    nonempty = [j for j, n in enumerate(sizes.tolist()) if n > 0]
    for i, row in enumerate(scale * q_centroids.double().cpu() @ k_centroids.double().cpu().T):
        logits = {j: (row[j] + sizes[j].double().cpu().log()).item() for j in nonempty}
        heaviest_first = sorted(nonempty, key=lambda j: (-logits[j], j))
        masses = torch.tensor([logits[j] for j in heaviest_first], dtype=torch.float64).softmax(0).tolist()
        taken, distance = 0.0, []
        for rank, (j, mass) in enumerate(zip(heaviest_first, masses, strict=True)):
            if rank >= max(least, 1) and taken >= p:
                # The first one left out: a swap with the last one taken would be another outcome too.
                distance.append(logits[heaviest_first[rank - 1]] - logits[j])
                break
            if rank >= least:
                distance.append(abs(taken - p))
            selected[i, j] = True
            taken += mass
        margin[i] = min([*distance, abs(taken - p)])
    return selected, margin


def logsumexp(q, keys, bias, scale):
    """Of each query's logits, fp64 `[B, H, N]`."""
    return (scale * q.double() @ keys.double().transpose(-1, -2) + bias).logsumexp(-1)


def moments(q, k, v, q_labels, k_labels, c_q, c_k, scale):
    """Of one head's tokens `[N, D]` in fp64, cluster by cluster: values, log_mass, variance, spread."""
    q, k, v = q.double(), k.double(), v.double()
    q_means = means(q, q_labels, c_q)
    values, spread = torch.zeros(c_k, v.shape[1], dtype=torch.float64), torch.zeros(c_k, dtype=torch.float64)
    log_mass, variance = torch.zeros(2, c_q, c_k, dtype=torch.float64)
    q_var = torch.zeros_like(q_means)
    for c in q_labels.unique().tolist():
        q_var[c] = q[q_labels == c].var(0, correction=0)
    for j in k_labels.unique().tolist():
        ks, vs = k[k_labels == j], v[k_labels == j]
        values[j] = vs.mean(0)
        spread[j] = (vs - values[j]).square().sum(1).mean().sqrt()
        logits = scale * q_means @ (ks - ks.mean(0)).T
        log_mass[:, j] = logits.logsumexp(1) - math.log(len(ks))
        variance[:, j] = logits.square().mean(1) + scale**2 * q_var @ ks.var(0, correction=0)
    return values, log_mass, variance, spread


def far_field(q, k, v, q_labels, k_labels, selected, scale, order, known=None):
    """Of one head in fp64, from the definition: for each query numerator `[N, D]` and denominator `[N]` of the stand-ins, and
    what the matrix adds to the numerator, before its share; logits less each query's `peak` `[N]`, which comes along.

    known: log_mass `[Cq, Ck]`, directions `[D, M]` and direction_variances `[Ck, M]`, for order 1.
    """
    q, k, v = q.double(), k.double(), v.double()
    c_q, c_k = selected.shape
    k_means, v_means, q_means = means(k, k_labels, c_k), means(v, k_labels, c_k), means(q, q_labels, c_q)
    sizes = torch.bincount(k_labels, minlength=c_k).double()
    extra = torch.zeros(len(q), c_k, dtype=torch.float64)
    if order == 1:
        log_mass, directions, variances = (x.double() for x in known)
        at_queries, at_means = (q @ directions).square(), (q_means @ directions).square()[q_labels]
        extra = log_mass[q_labels] + (0.5 * (at_queries - at_means) @ variances.T).clamp(-2, 2)
    logits = scale * q @ k_means.T + sizes.log() + extra
    logits[selected[q_labels]] = -torch.inf
    peak = logits.amax(1)
    weights = (logits - torch.where(peak == -torch.inf, 0.0, peak)[:, None]).exp()
    addition = torch.zeros_like(q)
    if order == 1:
        skipped = scale * q_means @ k_means.T + sizes.log() + log_mass
        skipped[selected] = -torch.inf
        share = skipped.softmax(1).nan_to_num(0.0)  # a row with nothing skipped
        w = (torch.bincount(q_labels, minlength=c_q).double()[:, None] * share).sum(0)
        w = w / w.sum() if w.sum() > 0 else w
        matrix = torch.zeros(v.shape[1], k.shape[1], dtype=torch.float64)
        for j in k_labels.unique().tolist():
            dk, dv = k[k_labels == j] - k_means[j], v[k_labels == j] - v_means[j]
            matrix += w[j] * dv.T @ dk / len(dk)
        addition = weights.sum(1, keepdim=True) * (scale * q @ matrix.T)
    return weights @ v_means, weights.sum(1), addition, peak


def merged(near, logsumexp, far, share):
    """Near field `[N, D]` with its logsumexp `[N]` and `far_field`'s result in one softmax, fp64."""
    numerator, denominator, addition, peak = far
    top = torch.maximum(logsumexp.double(), peak)
    near_weight, far_weight = (logsumexp.double() - top).exp()[:, None], (peak - top).exp()[:, None]
    total = near_weight[:, 0] + far_weight[:, 0] * denominator
    return (near_weight * near.double() + far_weight * (numerator + share * addition)) / total[:, None]


def by_error(q_means, k_means, q_sizes, k_sizes, moments, density, scale, dropped):
    """The map of one head, pair by pair: `selected` bool `[Cq, Ck]`, and `margin`: how near the last pair taken is to the
    first one left out, in worth. moments: values, log_mass, variance, spread."""
    _, log_mass, variance, spread = (x.double() for x in moments)
    logits = scale * q_means.double() @ k_means.double().T + k_sizes.double().log() + log_mass
    mass = logits.softmax(1)
    worth = {}
    for c in range(len(q_sizes)):
        for j in range(len(k_sizes)):
            if q_sizes[c] > 0 and k_sizes[j] > 0:
                share = 1.0 if dropped else (variance[c, j] * spread[j]).item()
                worth[c, j] = mass[c, j].item() * share / k_sizes[j].item()
    first = set()
    if dropped:
        for c in {c for c, _ in worth}:
            first.add(max((pair for pair in worth if pair[0] == c), key=lambda pair: (worth[pair], -pair[1])))
    ranked = sorted(first, key=lambda p: p) + sorted(set(worth) - first, key=lambda p: (-worth[p], p))
    budget, used = density * q_sizes.sum().item() * k_sizes.sum().item(), 0
    selected, margin = torch.zeros(len(q_sizes), len(k_sizes), dtype=torch.bool), torch.inf
    for rank, (c, j) in enumerate(ranked):
        used += q_sizes[c].item() * k_sizes[j].item()
        if used > budget and rank >= len(first):
            if rank > len(first):
                margin = worth[ranked[rank - 1]] / max(worth[c, j], 1e-300) - 1
            break
        selected[c, j] = True
    return selected, margin
