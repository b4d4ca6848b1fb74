"""Near field and centroids together in plain torch: the definition that the kernels of this folder are tested against."""

import torch

from ..far_field.reference import StandIns, merge_by_rows
from ..near_field.reference import near_field


def dynamic_attention(q, k, v, out, q_clusters, k_clusters, block_map, *, layout, scale, tail):
    logsumexp = near_field(q, k, v, out, q_clusters, k_clusters, block_map, layout=layout, scale=scale)
    if tail is None:
        return
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            bias = tail.biases[i, j].expand(block_map.shape[2:]).masked_fill(block_map[i, j], -torch.inf)
            merge_by_rows(
                StandIns(scale * tail.keys[i, j], tail.values[i, j], bias),
                q[i, j, layout.video], out[i, j, layout.video], logsumexp[i, j], q_clusters.order[i, j], q_clusters.offsets[i, j], None,
            )  # fmt: skip
