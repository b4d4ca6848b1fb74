"""The far field in plain torch, one head at a time: the definition that kernels are tested against."""

from dataclasses import dataclass

import torch

from ..kmeans.metric import finite
from ..segments import labels_in_order

_ROWS = 4096  # queries at a time: with 1,000 key clusters, 16 MB of logits
MAX_VARIANCE_TERM = 2.0  # of the logits' term of variances: beyond, where attention is very sharp, it does harm
MAX_COEFFICIENT = 1.5  # of the matrix A
_TINY = torch.finfo(torch.float32).tiny


def far_field(
    q, k, v, out, logsumexp, q_clusters, k_clusters, moments, selected, *,
    layout, scale, order, exact, matrix=None, merge=None,
):  # fmt: skip
    """matrix, merge: their implementations, by default those below."""
    matrix, merge = matrix or matrix_of, merge or merge_by_rows
    coefficients = torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device)
    queries, video = layout.video_queries, layout.video
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            q_order, q_offsets, q_centroids = (x[i, j] for x in q_clusters)
            k_order, k_offsets, k_centroids = (x[i, j] for x in k_clusters)
            m = type(moments)(*(None if x is None else x[i, j] for x in moments))
            # log 0 = -inf: an empty cluster weighs nothing. What is selected is computed exactly elsewhere.
            bias = k_offsets.diff().float().log().expand(selected.shape[2:]).masked_fill(selected[i, j], -torch.inf)
            head = StandIns(scale * k_centroids, m.values, bias)
            head_args = q[i, j, queries], out[i, j, queries], logsumexp[i, j], q_order, q_offsets
            if order == 1:
                head.bias = bias + m.log_mass
                head.directions, head.variances = m.directions, 0.5 * m.direction_variances.T
                head.at_centroids = (q_centroids @ m.directions).square()
                weight = head.skipped_mass(q_centroids, q_offsets.diff())
                head.matrix = scale * matrix(k[i, j, video], v[i, j, video], k_order, k_offsets, k_centroids, m.values, weight)
                coefficients[i, j] = head.fit_coefficient(*head_args, exact.rows[j], exact.out[i, j])
            merge(head, *head_args, coefficients[i, j])
    return coefficients


def matrix_of(k, v, k_order, k_offsets, k_centroids, values, weight):
    """A^T `[D, D]` (keys by values), the C_j summed with the clusters' `weight`: one product over all keys."""
    labels, order = labels_in_order(k_offsets), k_order.long()
    dk = finite(k[order]) - k_centroids[labels]
    dv = v[order].float() - values[labels]
    return dk.T @ dv.mul_((weight / k_offsets.diff().clamp_min(1))[labels, None])


@dataclass
class StandIns:
    """What stands in for one head's skipped pairs.

    keys, values `[Ck, D]`: of the stand-ins, the keys with the scale in them; bias `[Cq, Ck]`: added to their logits for the
    queries of a cluster, -inf where a pair was selected. Of order 1, too: directions `[D, M]`, variances `[M, Ck]` and the
    squared features at_centroids `[Cq, M]` of the term of variances, and the matrix A^T `[D, D]` with the scale in it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    directions: torch.Tensor | None = None
    variances: torch.Tensor | None = None
    at_centroids: torch.Tensor | None = None
    matrix: torch.Tensor | None = None

    def skipped_mass(self, q_centroids, q_sizes):
        """Of each key cluster, at the query centroids, each row normalised and weighted by its queries: `[Ck]`, sum 1 or 0."""
        logits = q_centroids @ self.keys.T + self.bias
        largest = logits.amax(1, keepdim=True)
        weights = (logits - torch.where(largest == -torch.inf, 0.0, largest)).exp_()  # a row with nothing skipped: zeros
        weights /= weights.sum(1, keepdim=True).clamp_min(_TINY)
        mass = (q_sizes[:, None] * weights).sum(0)
        return mass / mass.sum().clamp_min(_TINY)

    def parts(self, q, clusters, near, logsumexp):
        """For queries `[R, D]` of these clusters `[R]`, `[R, D]` each: the near field and the stand-ins merged, and what the
        matrix adds, or None."""
        logits = torch.addmm(self.bias[clusters], q, self.keys.T)
        if self.directions is not None:
            features = finite((q @ self.directions).square_() - self.at_centroids[clusters])
            logits += (features @ self.variances).clamp_(-MAX_VARIANCE_TERM, MAX_VARIANCE_TERM)
        largest = torch.maximum(logits.amax(1), logsumexp)[:, None]
        largest = torch.where(largest == -torch.inf, 0.0, largest)
        weights = logits.sub_(largest).exp_()
        near_weight, far_weight = (logsumexp[:, None] - largest).exp(), weights.sum(1, keepdim=True)
        total = near_weight + far_weight
        total = torch.where(total == 0, 1.0, total)  # nothing to attend to
        merged = torch.addmm(near_weight * near, weights, self.values) / total
        return merged, None if self.matrix is None else far_weight / total * (q @ self.matrix)

    def fit_coefficient(self, q, out, logsumexp, q_order, q_offsets, rows, exact):
        """The coefficient of A that fits the exact rows best, by least squares."""
        cluster_of = torch.empty(len(q_order), dtype=torch.long, device=q.device)
        cluster_of[q_order.long()] = labels_in_order(q_offsets)
        merged, correction = self.parts(q[rows].float(), cluster_of[rows], out[rows].float(), logsumexp[rows])
        coefficient = (correction * (exact - merged)).sum() / correction.square().sum()
        # 0 / 0: nothing was skipped, so that any coefficient serves. Or the inputs are not finite, as the result will not be.
        return coefficient.nan_to_num(1.0).clamp(0.0, MAX_COEFFICIENT)


def merge_by_rows(head: StandIns, q, out, logsumexp, q_order, q_offsets, coefficient):
    """The stand-ins into `out` `[N, D]`, which holds the near field."""
    merge_rows(head, q, out, logsumexp, q_order.long(), labels_in_order(q_offsets), coefficient)


def merge_rows(head: StandIns, q, out, logsumexp, rows, clusters, coefficient):
    """The same for some rows, of these clusters."""
    for rows_chunk, clusters_chunk in zip(rows.split(_ROWS), clusters.split(_ROWS), strict=True):
        merged, correction = head.parts(q[rows_chunk].float(), clusters_chunk, out[rows_chunk].float(), logsumexp[rows_chunk])
        out[rows_chunk] = (merged if correction is None else torch.addcmul(merged, correction, coefficient)).to(out.dtype)
