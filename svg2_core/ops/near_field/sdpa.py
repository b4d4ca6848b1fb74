"""The near field through torch's own fused attention: one call per query cluster, over the gathered keys of its selection."""

import torch
import torch.nn.functional as F

from .fused import attention_and_logsumexp

_POSITIONS = 2**20  # indices of keys at a time: 8 MB


def near_field(q, k, v, out, q_clusters, k_clusters, selected, *, layout, scale):
    text, asking = layout.text_index(k.shape[2], q.device), layout.text_queries(q.shape[2], q.device)
    logsumexp = torch.empty(*q.shape[:2], layout.queries_len, dtype=torch.float32, device=q.device)
    for i in range(q.shape[0]):
        bias = None if layout.text_bias is None else layout.text_bias[i].float()
        there = text if bias is None else text[bias > -torch.inf]  # a key that does not count is left out, not masked
        bias = None if bias is None else bias[bias > -torch.inf]
        for j in range(q.shape[1]):
            _video_queries(
                q[i, j, layout.video_queries], k[i, j, layout.video], v[i, j, layout.video], out[i, j, layout.video_queries], logsumexp[i, j],
                q_clusters.order[i, j].long(), q_clusters.offsets[i, j], k_clusters.order[i, j].long(), k_clusters.offsets[i, j],
                selected[i, j], k[i, j][there], v[i, j][there], bias, scale,
            )  # fmt: skip
            if len(asking):
                out[i, j][asking] = _text_queries(q[i, j][asking], k[i, j], v[i, j], layout, there, bias, scale)
    return logsumexp


def _video_queries(
    q, k, v, out, logsumexp, q_order, q_offsets, k_order, k_offsets, selected, text_k, text_v, text_bias, scale
):
    k, v = k.index_select(0, k_order), v.index_select(0, k_order)  # so that a cluster's keys are neighbours
    members = q_order.split(q_offsets.diff().tolist())
    for c, chosen in _selections(selected, k_offsets):
        rows = members[c]
        if not len(rows):
            continue
        keys, values = (k, v) if len(chosen) == len(k) else (k.index_select(0, chosen), v.index_select(0, chosen))
        bias = None
        if len(text_k):
            keys, values = torch.cat([keys, text_k]), torch.cat([values, text_v])
            bias = None if text_bias is None else F.pad(text_bias, (len(chosen), 0))
        out[rows], logsumexp[rows] = attention_and_logsumexp(q.index_select(0, rows), keys, values, bias, scale)


def _selections(selected: torch.Tensor, k_offsets: torch.Tensor):
    """(query cluster, where its selected keys stand in cluster order) for each, made for as many at a time as stay small."""
    sizes, starts = k_offsets.diff().long(), k_offsets[:-1].long()
    for first in range(0, len(selected), batch := max(1, _POSITIONS // max(1, int(k_offsets[-1])))):
        rows, chosen = selected[first : first + batch].nonzero().unbind(1)
        count = sizes[chosen]
        ends = count.cumsum(0)
        # Within a cluster places count up; from one to the next they jump.
        positions = (starts[chosen] - ends + count).repeat_interleave(count)
        positions += torch.arange(len(positions), device=positions.device)
        counts_of_row = torch.zeros(min(batch, len(selected) - first), dtype=torch.long, device=positions.device)
        yield from enumerate(positions.split(counts_of_row.index_add_(0, rows, count).tolist()), first)


def _text_queries(q, k, v, layout, there, bias, scale):
    """The text's queries attend to every key that counts."""
    if bias is None:
        return attention_and_logsumexp(q, k, v, None, scale)[0]
    video = torch.arange(layout.video.start, layout.video.stop, device=k.device)
    keys, bias = torch.cat([video, there]), F.pad(bias, (len(video), 0))
    return attention_and_logsumexp(q, k[keys], v[keys], bias, scale)[0]
