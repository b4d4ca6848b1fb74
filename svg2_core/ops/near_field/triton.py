"""Triton kernel of the near field: a program answers one query tile of one cluster, over the granules that its cluster attends to.

Key indices are loaded one step ahead of the key block that they address, so that its copies run ahead of the tensor cores.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..triton_common import INTERPRETED, LOG2E, block_of, dot, kernel
from .configs import config_for_device
from .plan import GRANULE, HIGH, plan
from .text_queries import text_queries


@triton.jit
def query_tile(tiles, tile_counts, q_order, q_offsets, row, n, c_q, tile_stride, BLOCK_M: tl.constexpr, ROWS: tl.constexpr):
    """This program's query tile: its cluster, its tokens and their mask; cluster -1 past the last tile."""
    program = tl.program_id(0)
    entry = tl.load(tiles + row * tile_stride + program, mask=program < tl.load(tile_counts + row), other=-1)
    cluster = entry >> 16
    clamped = tl.maximum(cluster, 0)
    begin = tl.load(q_offsets + row * (c_q + 1) + clamped) + (entry & 65535) * ROWS
    positions = begin + tl.arange(0, BLOCK_M)
    inside = (positions < tl.load(q_offsets + row * (c_q + 1) + clamped + 1)) & (cluster >= 0)
    return cluster, tl.load(q_order + row * n + positions, mask=inside, other=0), inside


@triton.jit
def online_softmax_step(qs, ks, vs, valid, bias, acc, row_sum, row_max, scale, UPCAST: tl.constexpr):
    """One step of the online softmax, in base 2: keys ks [D, N], values vs [N, D], bias [N] added to the logits."""
    logits = tl.where(valid[None, :], dot(qs, ks, UPCAST) * scale + bias[None, :], float("-inf"))
    new_max = tl.maximum(row_max, tl.max(logits, axis=1))
    p = tl.exp2(logits - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, axis=1)
    acc = acc * rescale[:, None] + dot(p.to(vs.dtype), vs, UPCAST)
    return acc, row_sum, new_max


@kernel
def near_field_kernel(
    q, k, v, out, logsumexp, q_order, q_offsets, keys, granule_lists, granule_counts, tiles, tile_counts, text_bias,
    scale, h, n_queries, n_video, video_start, padded_text, c_q, padded_keys, tile_stride,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, GRANULE: tl.constexpr,
    HAS_TEXT: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and logsumexp of one tile of BLOCK_M queries; q, out: the video's alone; ROWS: of a high tile, whatever this one is."""
    row = tl.program_id(1).to(tl.int64)
    cluster, tokens, inside = query_tile(tiles, tile_counts, q_order, q_offsets, row, n_queries, c_q, tile_stride, BLOCK_M, ROWS)
    if cluster < 0:
        return
    query = tokens.to(tl.int64)
    dims = tl.arange(0, BLOCK_D).to(tl.int64)
    dim_mask = dims < D
    batch, head = row // h, row % h
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    qs = tl.load(q + query[:, None] * q_n + dims[None, :] * q_d, mask=inside[:, None] & dim_mask[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: a fully masked key block must not make NaN
    column = tl.arange(0, BLOCK_N)
    no_bias = tl.zeros((BLOCK_N,), tl.float32)

    # Key blocks of the selected clusters' granules. `key` is loaded one step ahead.
    at = row * c_q + cluster
    granules = tl.load(granule_counts + at)
    granule_lists += at * (padded_keys // GRANULE)
    keys += row * padded_keys
    granule_index = column // GRANULE
    granule = tl.load(granule_lists + granule_index, mask=granule_index < granules, other=0)
    key = tl.load(keys + granule * GRANULE + column % GRANULE, mask=granule_index < granules, other=-1)
    for _ in range(0, tl.cdiv(granules * GRANULE, BLOCK_N)):
        valid = key >= 0
        token = key.to(tl.int64) + video_start
        ks = tl.load(k + token[None, :] * k_n + dims[:, None] * k_d, mask=valid[None, :] & dim_mask[:, None], other=0.0)
        vs = tl.load(v + token[:, None] * v_n + dims[None, :] * v_d, mask=valid[:, None] & dim_mask[None, :], other=0.0)
        granule_index += BLOCK_N // GRANULE
        granule = tl.load(granule_lists + granule_index, mask=granule_index < granules, other=0)
        key = tl.load(keys + granule * GRANULE + column % GRANULE, mask=granule_index < granules, other=-1)
        acc, row_sum, row_max = online_softmax_step(qs, ks, vs, valid, no_bias, acc, row_sum, row_max, scale, UPCAST)

    # Key blocks of text: the tokens before and after the video.
    if HAS_TEXT:
        for start in tl.range(0, padded_text, BLOCK_N, num_stages=1):
            text = start + column
            valid = text < padded_text
            token = tl.where(text < video_start, text, text + n_video).to(tl.int64)
            bias = no_bias
            if HAS_BIAS:
                bias = LOG2E * tl.load(text_bias + batch * padded_text + text, mask=valid, other=0.0)
            # A key of bias -inf is masked: its value may be NaN.
            valid = valid & (bias > float("-inf"))
            ks = tl.load(k + token[None, :] * k_n + dims[:, None] * k_d, mask=valid[None, :] & dim_mask[:, None], other=0.0)
            vs = tl.load(v + token[:, None] * v_n + dims[None, :] * v_d, mask=valid[:, None] & dim_mask[None, :], other=0.0)
            acc, row_sum, row_max = online_softmax_step(qs, ks, vs, valid, bias, acc, row_sum, row_max, scale, UPCAST)

    out += batch * o_b + head * o_h
    has_keys = row_sum != 0.0
    result = tl.where(has_keys[:, None], acc / tl.where(has_keys, row_sum, 1.0)[:, None], 0.0)
    tl.store(out + query[:, None] * o_n + dims[None, :] * o_d, result.to(out.dtype.element_ty), mask=inside[:, None] & dim_mask[None, :])
    lse = tl.where(has_keys, (row_max + tl.log2(tl.where(has_keys, row_sum, 1.0))) / LOG2E, float("-inf"))
    tl.store(logsumexp + row * n_queries + tokens, lse, mask=inside)


def _padded_bias(layout, k) -> tuple[torch.Tensor | None, int]:
    """The text keys' biases, padded by -inf to a multiple of 16 keys, and the padded count. Triton specialises on that divisibility:
    without it, it cannot vectorise the loads, and the kernel spills on sm_86."""
    n_text = k.shape[2] - layout.video_len
    padding, bias = -n_text % 16, layout.text_bias if n_text else None
    if padding:
        bias = k.new_zeros(k.shape[0], n_text, dtype=torch.float32) if bias is None else bias.float()
        bias = F.pad(bias, (0, padding), value=-torch.inf)
    return None if bias is None else bias.float().contiguous(), n_text + padding


def near_field(q, k, v, out, q_clusters, k_clusters, selected, *, layout, scale):
    """See `near_field` in `__init__.py`."""
    b, h, _, d = q.shape
    n_queries, n_video = layout.queries_len, layout.video_len
    logsumexp = torch.empty(b, h, n_queries, dtype=torch.float32, device=q.device)
    config, planned = config_for_device(q.device), plan(q_clusters, k_clusters, selected)
    bias, padded_text = _padded_bias(layout, k)
    video_q, video_out = (x[:, :, layout.video_queries] for x in (q, out))
    for tile, max_tiles, tiles, tile_counts in zip((config.high, config.low), planned.max_tiles, planned.tiles, planned.tile_counts, strict=True):
        if max_tiles == 0:
            continue
        near_field_kernel[max_tiles, b * h](
            video_q, k, v, video_out, logsumexp, q_clusters.order, q_clusters.offsets, planned.keys, planned.granule_lists, planned.granule_counts, tiles, tile_counts,
            q if bias is None else bias, scale * LOG2E.value, h, n_queries, n_video, layout.video_start, padded_text, selected.shape[2],
            planned.keys.shape[1], tiles.shape[1], *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            D=d, BLOCK_M=tile.rows, BLOCK_N=tile.keys, BLOCK_D=block_of(d), ROWS=HIGH, GRANULE=GRANULE, HAS_TEXT=padded_text > 0,
            HAS_BIAS=bias is not None, UPCAST=INTERPRETED, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    text_queries(q, k, v, out, layout, scale)
    return logsumexp
