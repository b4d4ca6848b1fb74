"""The far field: an approximation of the pairs that were not selected, merged into the near field."""

import torch

from ...layout import Layout
from ..exact_rows import ExactRows
from ..implementations import implementation
from ..kmeans import Clusters
from ..moments import Moments
from ..near_field import check_selection

ORDERS = (0, 1)


def far_field(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    q_clusters: Clusters,
    k_clusters: Clusters,
    moments: Moments,
    selected: torch.Tensor,
    *,
    layout: Layout,
    scale: float,
    order: int,
    exact: ExactRows,
    backend: str = "torch",
) -> torch.Tensor:
    """Merge the far field of the pairs that `selected` leaves out into the near field's `out` `[B, H, Nq, D]`, in place.

    logsumexp fp32 `[B, H, Vq]` and `out`: from `near_field`. With c a query's cluster, j over its skipped key clusters of n_j
    keys, centroids qc, kj, mean values vj, and the moments' names:

        out(q) = (e^lse near(q) + sum_j t_j(q) vj + a rho(q) scale A q) / (e^lse + rho(q)),    rho(q) = sum_j t_j(q)

    order 0: t_j(q) = n_j exp(scale q.kj), A = 0: each cluster's centroid stands in for its members.
    order 1: t_j(q) = n_j exp(scale q.kj + log_mass + clamp(1/2 sum_m ((z_m.q)^2 - (z_m.qc)^2) direction_variances, -2, 2)),
        A = sum_j w_j C_j with C_j = mean over j of (v - vj)(k - kj)^T: how the mean value of a skipped cluster moves with
        the query, one matrix for the head. w_j: the skipped mass of j at the query centroids, over all queries; sum_j w_j = 1.
        a: the coefficient of A, by least squares on the `exact` rows, from 0 to 1.5; 1 where they do not determine it.

    Nothing skipped, or nothing selected, is no special case: rho or e^lse is zero. All in fp32.

    -> a, fp32 `[B, H]`; zero for order 0.

    Raises ValueError where shapes disagree or `order` is neither 0 nor 1.
    Source: this project. Order 0 is what SVG-EAR (arXiv 2603.08982) does with the centroids, without its tail's error rule.
    """
    b, h = q.shape[:2]
    check_selection("far_field", q_clusters, k_clusters, selected, layout)
    if logsumexp.shape != (b, h, layout.queries_len) or out.shape != q.shape:
        raise ValueError(f"far_field: out {list(out.shape)}, logsumexp {list(logsumexp.shape)} do not fit q {list(q.shape)}")
    if order not in ORDERS:
        raise ValueError(f"far_field: order must be 0 or 1, got {order}")
    if exact.out.shape != (b, *exact.rows.shape, q.shape[3]):
        raise ValueError(f"far_field: exact rows {list(exact.rows.shape)} do not fit their answers {list(exact.out.shape)}")
    return implementation(__name__, backend).far_field(
        q, k, v, out, logsumexp, q_clusters, k_clusters, moments, selected,
        layout=layout, scale=scale, order=order, exact=exact,
    )  # fmt: skip
