"""The near field through torch's own fused attention: one call per query cluster, over the gathered keys of its selection."""

import torch
import torch.nn.functional as F

from . import reference
from .fused import attention_and_logsumexp

_MAX_INDICES = 2**20  # of gathered keys at a time: 8 MB


def near_field(q, k, v, out, q_clusters, k_clusters, selected, *, layout, scale):
    return reference.near_field(
        q, k, v, out, q_clusters, k_clusters, selected,
        layout=layout, scale=scale, text_keys=_text_keys, video_queries=_video_queries, text_queries=_text_queries,
    )  # fmt: skip


def _text_keys(text, bias):
    """As reference._text_keys: keys of bias -inf are left out, not masked."""
    return (text, None) if bias is None else (text[bias > -torch.inf], bias[bias > -torch.inf])


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
    """(query cluster, positions of its selected keys in cluster order) for each, in batches of at most _MAX_INDICES."""
    sizes, starts = k_offsets.diff().long(), k_offsets[:-1].long()
    for first in range(0, len(selected), batch := max(1, _MAX_INDICES // max(1, int(k_offsets[-1])))):
        rows, chosen = selected[first : first + batch].nonzero().unbind(1)
        count = sizes[chosen]
        ends = count.cumsum(0)
        # Positions are consecutive within a cluster.
        positions = (starts[chosen] - ends + count).repeat_interleave(count)
        positions += torch.arange(len(positions), device=positions.device)
        counts_of_row = torch.zeros(min(batch, len(selected) - first), dtype=torch.long, device=positions.device)
        yield from enumerate(positions.split(counts_of_row.index_add_(0, rows, count).tolist()), first)


def _text_queries(q, k, v, video, text, bias, scale):
    """As reference._text_queries."""
    if bias is None:
        return attention_and_logsumexp(q, k, v, None, scale)[0]
    keys = torch.cat([torch.arange(video.start, video.stop, device=k.device), text])
    bias = F.pad(bias, (video.stop - video.start, 0))
    return attention_and_logsumexp(q, k[keys], v[keys], bias, scale)[0]
