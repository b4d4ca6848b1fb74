"""The near field in plain torch, one query cluster at a time: the definition that kernels are tested against.

Only the selected pairs are computed: keys are gathered, never masked.
"""

import torch

from ..segments import labels_in_order

# Logits held at once, in elements: 64 M are 256 MB.
_MAX_LOGITS = 64 * 2**20


def near_field(
    q, k, v, out, q_clusters, k_clusters, selected, *,
    layout, scale, text_keys=None, video_queries=None, text_queries=None,
):  # fmt: skip
    """text_keys, video_queries, text_queries: their implementations, by default those below."""
    text_keys, video_queries, text_queries = text_keys or _text_keys, video_queries or _video_queries, text_queries or _text_queries
    text_rows = layout.text_queries(q.shape[2], q.device)
    logsumexp = torch.empty(*q.shape[:2], layout.queries_len, dtype=torch.float32, device=q.device)
    for i in range(q.shape[0]):
        text, bias = text_keys(layout.text_index(k.shape[2], q.device), None if layout.text_bias is None else layout.text_bias[i].float())
        for j in range(q.shape[1]):
            video_queries(
                q[i, j, layout.video_queries], k[i, j, layout.video], v[i, j, layout.video], out[i, j, layout.video_queries], logsumexp[i, j],
                q_clusters.order[i, j].long(), q_clusters.offsets[i, j], k_clusters.order[i, j].long(), k_clusters.offsets[i, j],
                selected[i, j], k[i, j][text], v[i, j][text], bias, scale,
            )  # fmt: skip
            if len(text_rows):
                out[i, j][text_rows] = text_queries(q[i, j][text_rows], k[i, j], v[i, j], layout.video, text, bias, scale).to(out.dtype)
    return logsumexp


def _text_keys(text, bias):
    """The text keys to attend to, of one batch row, and their bias."""
    return text, torch.zeros(len(text), dtype=torch.float32, device=text.device) if bias is None else bias


def _text_queries(q, k, v, video, text, bias, scale):
    """Text queries attend to every key; video: a slice of the keys, text, bias: the other keys and their biases."""
    all_bias = bias.new_zeros(len(k))
    all_bias[text] = bias
    return attend(q, k, v, all_bias, scale)[0]


def _video_queries(
    q, k, v, out, logsumexp, q_order, q_offsets, k_order, k_offsets, selected, text_k, text_v, text_bias, scale
):
    q_offsets = q_offsets.tolist()
    labels = labels_in_order(k_offsets)  # gathers entire clusters by one index
    k, v = k[k_order].float(), v[k_order].float()
    text_k, text_v = text_k.float(), text_v.float()
    for c in range(len(q_offsets) - 1):
        rows = q_order[q_offsets[c] : q_offsets[c + 1]]
        if len(rows) == 0:
            continue
        chosen = selected[c][labels].nonzero()[:, 0]
        keys, values, bias = k[chosen], v[chosen], None
        if len(text_k):
            keys, values = torch.cat([keys, text_k]), torch.cat([values, text_v])
            bias = torch.cat([text_bias.new_zeros(len(chosen)), text_bias])
        result, logsumexp[rows] = attend(q[rows], keys, values, bias, scale)
        out[rows] = result.to(out.dtype)


def attend(q, k, v, bias, scale):
    """softmax(scale * q k^T + bias) v of rows `[R, D]`, and the logits' logsumexp `[R]`; fp32, in chunks of rows.

    bias `[keys]` or None. With no key, or all of bias -inf, zero and -inf.
    """
    k, v = k.float(), v.float()
    if len(k) == 0:
        return torch.zeros(q.shape, dtype=torch.float32, device=q.device), q.new_full(q.shape[:1], -torch.inf).float()
    out, logsumexp = [], []
    for chunk in q.split(max(1, _MAX_LOGITS // len(k))):
        logits = torch.mm(chunk.float() * scale, k.T)
        if bias is not None:
            logits += bias
        largest = logits.amax(1, keepdim=True)
        largest = torch.where(largest == -torch.inf, 0.0, largest)  # every key has bias -inf
        weights = logits.sub_(largest).exp_()
        total = weights.sum(1, keepdim=True)
        out.append((weights @ v) / torch.where(total == 0, 1.0, total))
        logsumexp.append((total.log() + largest)[:, 0])
    return torch.cat(out), torch.cat(logsumexp)
