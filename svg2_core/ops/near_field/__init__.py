"""The near field: exact attention over the selected pairs of clusters and all text."""

import torch

from ...layout import Layout
from ..implementations import implementation
from ..kmeans import Clusters


def near_field(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_clusters: Clusters,
    k_clusters: Clusters,
    selected: torch.Tensor,
    *,
    layout: Layout,
    scale: float,
    out: torch.Tensor | None = None,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T + bias) v over the selected pairs; q `[B, H, Nq, D]`, k, v `[B, H, N, D]` in any strides.

    A video query attends to the video keys of the key clusters that `selected` (bool `[B, H, Cq, Ck]`) names for its query
    cluster, and to every text key. A text query attends to every key. `layout.text_bias` is added to the logits of text
    keys. Cluster orders index the video tokens. Softmax and sums are fp32.

    -> (out, logsumexp): out has q's shape and dtype, in token order: written to `out` (q's shape, any strides)
    if given, else to a new tensor in q's memory order. logsumexp fp32 `[B, H, Vq]` of the video queries' logits, in
    token order: what merging with a far field needs. A query with nothing to attend to has zero and -inf.

    Raises ValueError where shapes disagree.
    Source: SVG2 (arXiv 2505.18875), section 4.3.
    """
    out = check_call("near_field", q, k, v, layout, q_clusters, k_clusters, selected, out)
    logsumexp = implementation(__name__, backend).near_field(
        q, k, v, out, q_clusters, k_clusters, selected, layout=layout, scale=scale
    )
    return out, logsumexp


def check_call(name: str, q, k, v, layout: Layout, q_clusters, k_clusters, selected, out, selection: str = "selected") -> torch.Tensor:
    """Raise ValueError, in the name of an operation, unless its arguments fit each other; -> `out`, made where it is None.

    selection: the operation's name for its block map.
    """
    b, h, n, d = q.shape
    if k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (b, h, d):
        raise ValueError(f"{name}: q, k, v must have one shape but for the count of queries, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    layout.check(n, k.shape[2])
    if layout.text_bias is not None and layout.text_bias.shape[0] != b:
        raise ValueError(f"{name}: layout.text_bias has {layout.text_bias.shape[0]} rows, the call has {b}")
    check_selection(name, q_clusters, k_clusters, selected, layout, selection)
    if out is None:
        return torch.empty_like(q)
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"{name}: out must be {q.dtype} {list(q.shape)}, got {out.dtype} {list(out.shape)}")
    return out


def check_selection(name: str, q_clusters: Clusters, k_clusters: Clusters, selected: torch.Tensor, layout: Layout, selection="selected") -> None:
    """The same for clusters and block map: they must fit the layout and each other."""
    heads = selected.shape[:2]
    for role, clusters, tokens in (("q_clusters", q_clusters, layout.queries_len), ("k_clusters", k_clusters, layout.video_len)):
        if clusters.order.shape != (*heads, tokens):
            raise ValueError(f"{name}: {role} orders {list(clusters.order.shape)} do not fit {[*heads, tokens]}")
    expected = (*heads, q_clusters.offsets.shape[-1] - 1, k_clusters.offsets.shape[-1] - 1)
    if selected.shape != expected or selected.dtype != torch.bool:
        raise ValueError(f"{name}: {selection} must be bool {list(expected)}, got {selected.dtype} {list(selected.shape)}")
