"""Near field and centroids in one: what the GPU kernels serve until they have the stages of near_field and far_field."""

from typing import NamedTuple

import torch

from ...layout import Layout
from .. import registry
from ..kmeans import Clusters
from ..near_field import check_call


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
    out = check_call("dynamic_attention", q, k, v, layout, q_clusters, k_clusters, block_map, out, "block_map")
    registry.implementation(__name__, backend).dynamic_attention(
        q, k, v, out, q_clusters, k_clusters, block_map, layout=layout, scale=scale, tail=tail
    )
    return out
