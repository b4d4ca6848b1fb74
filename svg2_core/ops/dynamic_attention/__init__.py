"""Near field and centroids in one: what the GPU kernels serve until they have the stages of near_field and far_field."""

from typing import NamedTuple

import torch

from ...layout import Layout
from .. import registry
from ..kmeans import Clusters


class Tail(NamedTuple):
    """Virtual keys, one per key cluster, used exactly where the block map is False.

    keys `[B, H, Ck, D]`, values `[B, H, Ck, D]`, biases `[B, H, Ck]` added to the logits (-inf for an empty cluster); fp32.
    """

    keys: torch.Tensor
    values: torch.Tensor
    biases: torch.Tensor


def dynamic_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_clusters: Clusters,
    k_clusters: Clusters,
    block_map: torch.Tensor,
    *,
    layout: Layout,
    scale: float,
    tail: Tail | None = None,
    out: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """softmax(scale * q k^T + bias) v over the selected pairs; q, k, v `[B, H, N, D]` in any strides, result likewise.

    A video query attends to the video keys of the key clusters that `block_map` (bool `[B, H, Cq, Ck]`) selects for its
    query cluster, to every text key, and with `tail` to one virtual key for each cluster not selected. A text query
    attends to every key. `layout.text_bias` is added to the logits of text keys. Cluster orders index the video tokens.
    Softmax and sums are fp32; the result has q's dtype, at the tokens' own places: written to `out` (q's shape, any
    strides) if given, else to a new tensor in q's memory order.

    Raises ValueError where shapes disagree.
    Source: SVG2 (arXiv 2505.18875), section 4.3; the tail is this project's (DESIGN: compensation).
    """
    b, h, n, _ = q.shape
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"dynamic_attention: q, k, v must have one shape, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    layout.check(n)
    if layout.text_bias is not None and layout.text_bias.shape[0] != b:
        raise ValueError(f"dynamic_attention: layout.text_bias has {layout.text_bias.shape[0]} rows, the call has {b}")
    for name, clusters in (("q_clusters", q_clusters), ("k_clusters", k_clusters)):
        if clusters.order.shape != (b, h, layout.video_len):
            raise ValueError(
                f"dynamic_attention: {name} orders {list(clusters.order.shape)} do not fit {[b, h, layout.video_len]}"
            )
    expected = (b, h, q_clusters.offsets.shape[-1] - 1, k_clusters.offsets.shape[-1] - 1)
    if block_map.shape != expected or block_map.dtype != torch.bool:
        raise ValueError(f"dynamic_attention: block_map must be bool {list(expected)}, got {list(block_map.shape)}")
    if out is None:
        out = torch.empty_like(q)
    elif out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"dynamic_attention: out must be {q.dtype} {list(q.shape)}, got {out.dtype} {list(out.shape)}")
    registry.implementation(__name__, backend).dynamic_attention(
        q, k, v, out, q_clusters, k_clusters, block_map, layout=layout, scale=scale, tail=tail
    )
    return out
