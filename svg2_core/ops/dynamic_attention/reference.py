"""Dynamic-block attention in plain torch, one query cluster at a time: the definition that kernels are tested against.

Only the selected pairs are computed: keys are gathered, never masked.
"""

import torch

# Logits held at once, in elements: 64 M are 256 MB.
_MAX_LOGITS = 64 * 2**20


def dynamic_attention(q, k, v, out, q_clusters, k_clusters, block_map, *, layout, scale, tail):
    text = layout.text_index(q.shape[2], q.device)
    for i in range(q.shape[0]):
        bias = None if layout.text_bias is None else layout.text_bias[i].float()
        for j in range(q.shape[1]):
            head_tail = None if tail is None else (tail.keys[i, j], tail.values[i, j], tail.biases[i, j])
            _head(
                q[i, j], k[i, j], v[i, j], out[i, j],
                q_clusters.order[i, j].long() + layout.video_start, q_clusters.offsets[i, j],
                k_clusters.order[i, j].long() + layout.video_start, k_clusters.offsets[i, j],
                block_map[i, j], text, bias, scale, head_tail,
            )  # fmt: skip


def _head(q, k, v, out, q_order, q_offsets, k_order, k_offsets, block_map, text, text_bias, scale, tail):
    q_offsets = q_offsets.tolist()
    if text_bias is None:
        text_bias = q.new_zeros(len(text), dtype=torch.float32)
    # Which cluster each key of the cluster order belongs to, to gather whole clusters by one index.
    k_label = torch.repeat_interleave(k_offsets.diff().long())
    text_k, text_v = k[text].float(), v[text].float()
    for c in range(len(q_offsets) - 1):
        rows = q_order[q_offsets[c] : q_offsets[c + 1]]
        if len(rows) == 0:
            continue
        chosen = k_order[block_map[c][k_label]]
        keys, values = [k[chosen].float(), text_k], [v[chosen].float(), text_v]
        bias = [text_bias.new_zeros(len(chosen)), text_bias]
        if tail is not None:
            skipped = ~block_map[c]
            keys.append(tail[0][skipped])
            values.append(tail[1][skipped])
            bias.append(tail[2][skipped])
        out[rows] = attend(q[rows], torch.cat(keys), torch.cat(values), torch.cat(bias), scale).to(out.dtype)
    if len(text):
        bias = text_bias.new_zeros(len(k))
        bias[text] = text_bias
        out[text] = attend(q[text], k.float(), v.float(), bias, scale).to(out.dtype)


def attend(q, k, v, bias, scale):
    """softmax(scale * q k^T + bias) v in fp32, `[rows, D]`, in chunks of rows."""
    rows = max(1, _MAX_LOGITS // max(1, len(k)))
    return torch.cat([(scale * (part.float() @ k.T) + bias).softmax(-1) @ v for part in q.split(rows)])
