"""The operations in fp64 by the shortest way that is obviously right: all pairs at once, nothing shared with svg2_core.

They take labels (the cluster of each token), not orders and offsets, so reading those is tested as well.
"""

import torch


def pairs(q, k, v, q_labels, k_labels, selected, video_start, text_bias=None, tail=None):
    """Sparse attention as a dense one: keys `[B,H,M,D]`, values, and a bias `[B,H,N,M]` that is -inf where not computed.

    M is N, plus one virtual key per key cluster if there is a tail. text_bias `[B, N - V]`, tail (keys, values, biases).
    """
    b, h, n, _ = q.shape
    clusters = selected.shape[-1]
    video = torch.arange(video_start, video_start + q_labels.shape[-1], device=q.device)
    is_text = torch.ones(n, dtype=torch.bool, device=q.device)
    is_text[video] = False

    bias = torch.zeros(b, h, n, n, dtype=torch.float64, device=q.device)
    if text_bias is not None:
        bias[..., is_text] += text_bias[:, None, None, :].double()
    extra = torch.full((b, h, n, clusters), -torch.inf, dtype=torch.float64, device=q.device)
    for i in range(b):
        for j in range(h):
            chosen = selected[i, j][q_labels[i, j]]  # [V, Ck]: for each video query, the key clusters it sees
            block = torch.zeros(len(video), len(video), dtype=torch.float64, device=q.device)
            block[~chosen[:, k_labels[i, j]]] = -torch.inf
            bias[i, j, video_start : video_start + len(video), video_start : video_start + len(video)] = block
            if tail is not None:
                stand_in = tail[2][i, j].double().expand(len(video), clusters).clone()
                stand_in[chosen] = -torch.inf
                extra[i, j, video] = stand_in
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
