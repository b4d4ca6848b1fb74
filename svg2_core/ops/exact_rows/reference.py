"""Exact rows in plain torch, one head at a time: the definition that kernels are tested against."""

import torch

from ..kmeans.cold_start import seed_tokens
from ..near_field.reference import attend
from . import ROLE


def exact_rows(q, k, v, layout, scale, seed, first_head, count):
    (b, h, _, d), n = q.shape, k.shape[2]
    rows = seed_tokens(layout.queries_len, count, seed, ROLE, first_head, h, q.device)
    out = torch.empty(b, h, count, d, dtype=torch.float32, device=q.device)
    text = layout.text_index(n, q.device)
    for i in range(b):
        bias = None
        if layout.text_bias is not None and len(text):
            bias = torch.zeros(n, dtype=torch.float32, device=q.device)
            bias[text] = layout.text_bias[i].float()
        for j in range(h):
            out[i, j] = attend(q[i, j, layout.video_queries][rows[j]], k[i, j], v[i, j], bias, scale)[0]
    return rows, out


def squared_error(exact, out, layout):
    b, h, r, d = exact.out.shape
    result = out[:, :, layout.video_queries].gather(2, exact.rows[None, :, :, None].expand(b, h, r, d)).float()
    return torch.stack([(result - exact.out).square().sum((2, 3)), exact.out.square().sum((2, 3))], -1)
