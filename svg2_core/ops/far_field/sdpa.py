"""The far field for the sdpa backend: products of one query cluster at a time, whose queries have one row of biases."""

import torch

from ..moments.sdpa import deviations
from ..segments import labels_in_order, tiles_of_segments
from . import reference
from .reference import MAX_VARIANCE_TERM

_TILE = 2**18  # logits of a tile: 1 MB
_ROWS = 2048  # tokens at a time: as much


def far_field(q, k, v, out, logsumexp, q_clusters, k_clusters, moments, selected, *, layout, scale, order, exact):
    return reference.far_field(
        q, k, v, out, logsumexp, q_clusters, k_clusters, moments, selected,
        layout=layout, scale=scale, order=order, exact=exact, matrix=matrix, merge=merge,
    )  # fmt: skip


def matrix(k, v, k_order, k_offsets, k_centroids, values, weight):
    """As reference.matrix_of."""
    weight = weight / k_offsets.diff().clamp_min(1)
    total = k_centroids.new_zeros(k.shape[1], v.shape[1])
    labels = labels_in_order(k_offsets)
    for first in range(0, len(k), _ROWS):
        rows = slice(first, first + _ROWS)
        tokens, chunk_labels = k_order[rows], labels[rows]
        dv = v.index_select(0, tokens).float() - values.index_select(0, chunk_labels)
        total.addmm_(deviations(k, tokens, chunk_labels, k_centroids).T, dv.mul_(weight[chunk_labels, None]))
    return total


def merge(head: reference.StandIns, q, out, logsumexp, q_order, q_offsets, coefficient):
    """As reference.merge_by_rows, by query cluster.

    Weights are relative to the near field's mass, so that they need no row maximum. Queries for which these overflow, and those
    whose term of variances may have to be clamped, are done as in reference.py.
    """
    order, labels = q_order.long(), labels_in_order(q_offsets)
    stand_ins = _StandIns(head)
    correction = None if head.matrix is None else coefficient * head.matrix
    slow = []
    for rows, clusters in tiles_of_segments(q_offsets, _ROWS):
        tokens = order[rows]
        queries, near = q.index_select(0, tokens).float(), out.index_select(0, tokens).float()
        far, redo = stand_ins(queries, logsumexp[tokens], q_offsets[clusters.start : clusters.stop + 1] - rows.start, clusters)
        far, weight = far[:, :-1], far[:, -1:]
        if correction is not None:
            far.addcmul_(torch.mm(queries, correction), weight)
        near.add_(far).div_(1 + weight)
        redo |= ~(weight[:, 0] < torch.inf)  # so, too, where it is NaN
        if redo.any():
            slow.append((tokens[redo], labels[rows][redo]))
            tokens, near = tokens[~redo], near[~redo]
        out[tokens] = near.to(out.dtype)
    if slow:
        rows, clusters = (torch.cat(parts) for parts in zip(*slow, strict=True))
        reference.merge_rows(head, q, out, logsumexp, rows, clusters, coefficient)


class _StandIns:
    """What stands in for one head's skipped pairs, laid out for products.

    All of a logit is one product. Queries have more channels: the logsumexp, 1 for the cluster's biases, and the squared
    features of the term of variances; those of the centroid, the same for a whole cluster, are part of its biases.
    """

    def __init__(self, head: reference.StandIns):
        self.head, count = head, len(head.keys)
        rows, self.biases = [head.keys.T, head.keys.new_ones(2, count)], head.bias
        if head.directions is not None:
            rows.append(head.variances)
            self.biases = torch.addmm(head.bias, head.at_centroids, head.variances, alpha=-1)
            self.max_variances = head.variances.amax(1)
        self.keys, self.values = torch.cat(rows), torch.cat([head.values, torch.ones_like(head.values[:, :1])], 1)
        self.max_rows = max(1, _TILE // count)

    def __call__(self, q, logsumexp, offsets, clusters: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries `[R, D]` of some clusters, in their order: the stand-ins' values times their weights, and the weights,
        summed, `[R, D + 1]`; and whether something may have to be clamped, bool `[R]`."""
        d, head = q.shape[1], self.head
        channels, redo = [q, -logsumexp[:, None], torch.ones_like(q[:, :1])], torch.zeros(len(q), dtype=torch.bool, device=q.device)
        if head.directions is not None:
            features = (q @ head.directions).square_()
            channels.append(features)
            deviation = features - head.at_centroids[clusters].index_select(0, labels_in_order(offsets))
            redo = ~(deviation.abs_() @ self.max_variances <= MAX_VARIANCE_TERM)  # so, too, where one is NaN
        queries, bounds = torch.cat(channels, 1), offsets.tolist()
        result = torch.empty_like(queries[:, : d + 1])
        for i, c in enumerate(range(clusters.start, clusters.stop)):
            self.keys[d + 1] = self.biases[c]
            for first in range(bounds[i], bounds[i + 1], self.max_rows):
                chunk = slice(first, min(first + self.max_rows, bounds[i + 1]))
                torch.mm(torch.mm(queries[chunk], self.keys).exp_(), self.values, out=result[chunk])
        return result, redo
