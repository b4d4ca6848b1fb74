"""The far field for torch's own libraries: one query cluster at a time, whose queries share a row of the stand-ins' biases."""

import torch

from ..moments.sdpa import deviations
from ..segments import labels_in_order
from . import reference
from .reference import MOST_VARIANCE

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
        there, of = k_order[rows], labels[rows]
        dv = v.index_select(0, there).float() - values.index_select(0, of)
        total.addmm_(deviations(k, there, of, k_centroids).T, dv.mul_(weight[of, None]))
    return total


def merge(head: reference.StandIns, q, out, logsumexp, q_order, q_offsets, share):
    """As reference.merge_by_rows, by query cluster.

    Weights are in units of the near field's mass, so that they need no largest logit. Queries for which that is next to
    nothing, and those of which something of the term of variances may have to be clamped, are done as in reference.py.
    """
    order, labels, given = q_order.long(), labels_in_order(q_offsets), (q, out, logsumexp)
    q, near, lse = q.index_select(0, order).float(), out.index_select(0, order).float(), logsumexp[order]
    far = _stand_ins(head, q, lse, q_offsets.tolist())
    far, weight = far[:, :-1], far[:, -1:]
    if head.matrix is not None:
        far.addcmul_(torch.mm(q, share * head.matrix), weight)
    near.add_(far).div_(1 + weight)

    again = ~(weight[:, 0] < torch.inf)  # so, too, where it is NaN
    if head.directions is not None:
        strayed = ((q @ head.directions).square_() - head.at_centroids.index_select(0, labels)).abs_()
        again |= ~(strayed @ head.variances.amax(1) <= MOST_VARIANCE)
    fast, slow = (~again).nonzero()[:, 0], again.nonzero()[:, 0]
    reference.merge_rows(head, *given, order[slow], labels[slow], share)
    if len(slow):
        order, near = order[fast], near[fast]
    out[order] = near.to(out.dtype)


def _stand_ins(head: reference.StandIns, q, logsumexp, bounds) -> torch.Tensor:
    """Of queries `[N, D]` in cluster order: the stand-ins' values times their weights, and the weights, summed: `[N, D + 1]`.

    All of a logit is one product. Queries have more channels: the logsumexp, 1 for the cluster's biases, and the squared
    features of the term of variances; those of the centroid, the same for a whole cluster, are part of its biases.
    """
    d, count = q.shape[1], len(head.keys)
    channels, rows = [q, -logsumexp[:, None], torch.ones_like(q[:, :1])], [head.keys.T, q.new_ones(2, count)]
    biases = head.bias
    if head.directions is not None:
        channels.append((q @ head.directions).square_())
        rows.append(head.variances)
        biases = torch.addmm(biases, head.at_centroids, head.variances, alpha=-1)
    queries, keys = torch.cat(channels, 1), torch.cat(rows)
    values = torch.cat([head.values, torch.ones_like(head.values[:, :1])], 1)
    result, most = torch.empty_like(queries[:, : d + 1]), max(1, _TILE // count)
    for c in range(len(bounds) - 1):
        keys[d + 1] = biases[c]
        for first in range(bounds[c], bounds[c + 1], most):
            some = slice(first, min(first + most, bounds[c + 1]))
            torch.mm(torch.mm(queries[some], keys).exp_(), values, out=result[some])
    return result
