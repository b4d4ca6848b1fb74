"""Dynamic-block attention as Triton kernels.

The keys of all selected clusters of a query cluster are packed into full tiles: a planning kernel lays the clusters out
one after another, and for each tile says where in that row of clusters it begins. The attention kernel then maps a tile's
slots to tokens by comparison and gathers their rows, so key clusters of any size fill the tensor cores. Everything is
sized by shapes: no number ever travels to the host.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import INTERPRETED, dot
from .configs import config_for_device
from .tiles import in_precision, launches, text_queries


@triton.jit
def plan_kernel(
    block_map, k_offsets, ids, ends, shifts, first_rank, n_selected, n_filled, n_keys,
    c_q, c_k, tiles, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Lay out the key clusters of one query cluster: the selected ones, then the other non-empty ones.

    For rank r: ids[r] the cluster; for selected ones also ends[r], the slots up to and including it, and shifts[r], what
    to add to a slot to get its place in the key order. first_rank[t]: the rank that slot t * BLOCK_N falls into.
    """
    row = tl.program_id(1).to(tl.int64)
    at = row * c_q + tl.program_id(0)
    j = tl.arange(0, BLOCK_K)
    begin = tl.load(k_offsets + row * (c_k + 1) + j, mask=j < c_k, other=0)
    size = tl.load(k_offsets + row * (c_k + 1) + j + 1, mask=j < c_k, other=0) - begin
    taken = (tl.load(block_map + at * c_k + j, mask=j < c_k, other=0) != 0) & (size > 0)
    other = (size > 0) & (taken == 0)
    rank = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    selected = tl.sum(taken.to(tl.int32), axis=0)
    end = tl.cumsum(tl.where(taken, size, 0), axis=0)
    tl.store(ids + at * c_k + rank, j, mask=taken)
    tl.store(ends + at * c_k + rank, end, mask=taken)
    tl.store(shifts + at * c_k + rank, begin - (end - size), mask=taken)
    behind = selected + tl.cumsum(other.to(tl.int32), axis=0) - 1
    tl.store(ids + at * c_k + behind, j, mask=other)
    tl.store(n_selected + at, selected)
    tl.store(n_filled + at, selected + tl.sum(other.to(tl.int32), axis=0))
    tl.store(n_keys + at, tl.sum(tl.where(taken, size, 0), axis=0))
    # A cluster holds the first slot of tile t if begin <= t * BLOCK_N < end; a large one holds several.
    tile = (end - size + BLOCK_N - 1) // BLOCK_N
    last = (end + BLOCK_N - 1) // BLOCK_N
    for _ in range(0, tl.max(tl.where(taken, last - tile, 0), axis=0)):
        tl.store(first_rank + at * tiles + tile, rank, mask=taken & (tile < last))
        tile += 1


@triton.jit
def _absorb(qs, ks, vs, bias, acc, total, peak, scale, UPCAST: tl.constexpr):
    """One step of the online softmax, in base 2: keys ks [D, N], values vs [N, D], bias [N] added to the logits."""
    logits = dot(qs, ks, UPCAST) * scale + bias[None, :]
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    p = tl.exp2(logits - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    total = total * fade + tl.sum(p, axis=1)
    acc = acc * fade[:, None] + dot(p.to(vs.dtype), vs, UPCAST)
    return acc, total, new_peak


@triton.jit
def attention_kernel(
    q, k, v, out, q_order, q_offsets, tile_ends, k_order, ids, ends, shifts, first_rank, n_selected, n_filled, n_keys,
    text_bias, tail_keys, tail_values, tail_biases,
    scale, heads, n_video, video_start, n_text, c_q, c_k, tiles,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    REST: tl.constexpr, FULL: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one cluster. REST: this launch takes the last rows of a cluster, after its tiles of FULL."""
    row = tl.program_id(1).to(tl.int64)
    # Which cluster this program's tile belongs to: as many clusters end at or before it.
    program = tl.program_id(0)
    clusters = tl.arange(0, BLOCK_C)
    tile_end = tl.load(tile_ends + row * c_q + clusters, mask=clusters < c_q, other=2147483647)
    cluster = tl.sum((tile_end <= program).to(tl.int32), axis=0)
    if cluster >= c_q:
        return
    tile = program - tl.max(tl.where(tile_end <= program, tile_end, 0), axis=0)
    begin = tl.load(q_offsets + row * (c_q + 1) + cluster)
    end = tl.load(q_offsets + row * (c_q + 1) + cluster + 1)
    if REST:
        begin += (end - begin) // FULL * FULL
    places = begin + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = places < end
    query = tl.load(q_order + row * n_video + places, mask=inside, other=0).to(tl.int64) + video_start
    dims = tl.arange(0, BLOCK_D).to(tl.int64)
    real = dims < D
    batch, head = row // heads, row % heads
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    qs = tl.load(q + query[:, None] * q_n + dims[None, :] * q_d, mask=inside[:, None] & real[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: a fully masked tile must not make NaN
    slot = tl.arange(0, BLOCK_N)
    at = row * c_q + cluster

    # The selected clusters. A tile of BLOCK_N slots meets at most BLOCK_N of them, for none is empty.
    keys = tl.load(n_keys + at)
    selected = tl.load(n_selected + at)
    for t in range(0, tl.cdiv(keys, BLOCK_N)):
        slots = t * BLOCK_N + slot
        first = tl.load(first_rank + at * tiles + t)
        mine = tl.zeros((BLOCK_N,), tl.int32) + first
        for part in tl.static_range(0, BLOCK_N, 16):  # in parts, for a [BLOCK_N, BLOCK_N] comparison fills the registers
            ranks = first + part + tl.arange(0, 16)
            cluster_end = tl.load(ends + at * c_k + ranks, mask=ranks < selected, other=2147483647)
            mine += tl.sum((cluster_end[None, :] <= slots[:, None]).to(tl.int32), axis=1)
        there = slots < keys
        shift = tl.load(shifts + at * c_k + mine, mask=there, other=0)
        key = tl.load(k_order + row * n_video + slots + shift, mask=there, other=0).to(tl.int64) + video_start
        ks = tl.load(k + key[None, :] * k_n + dims[:, None] * k_d, mask=there[None, :] & real[:, None], other=0.0)
        vs = tl.load(v + key[:, None] * v_n + dims[None, :] * v_d, mask=there[:, None] & real[None, :], other=0.0)
        bias = tl.where(there, 0.0, float("-inf"))
        acc, total, peak = _absorb(qs, ks, vs, bias, acc, total, peak, scale, UPCAST)

    # Text, exact: the tokens before and after the video.
    if HAS_TEXT:
        for start in range(0, n_text, BLOCK_N):
            text = start + slot
            there = text < n_text
            key = tl.where(text < video_start, text, text + n_video).to(tl.int64)
            ks = tl.load(k + key[None, :] * k_n + dims[:, None] * k_d, mask=there[None, :] & real[:, None], other=0.0)
            vs = tl.load(v + key[:, None] * v_n + dims[None, :] * v_d, mask=there[:, None] & real[None, :], other=0.0)
            bias = tl.where(there, 0.0, float("-inf"))
            if HAS_BIAS:
                bias += 1.4426950408889634 * tl.load(text_bias + batch * n_text + text, mask=there, other=0.0)
            acc, total, peak = _absorb(qs, ks, vs, bias, acc, total, peak, scale, UPCAST)

    # One virtual key for each cluster that was not selected.
    if HAS_TAIL:
        filled = tl.load(n_filled + at)
        for start in range(selected, filled, BLOCK_N):
            ranks = start + slot
            there = ranks < filled
            skipped = tl.load(ids + at * c_k + ranks, mask=there, other=0) + row * c_k
            ks = tl.load(tail_keys + skipped[None, :] * D + dims[:, None], mask=there[None, :] & real[:, None], other=0.0)
            vs = tl.load(tail_values + skipped[:, None] * D + dims[None, :], mask=there[:, None] & real[None, :], other=0.0)
            bias = 1.4426950408889634 * tl.load(tail_biases + skipped, mask=there, other=float("-inf"))
            acc, total, peak = _absorb(qs, ks, vs, bias, acc, total, peak, scale, UPCAST)

    out += batch * o_b + head * o_h
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + query[:, None] * o_n + dims[None, :] * o_d, result, mask=inside[:, None] & real[None, :])


def dynamic_attention(q, k, v, out, q_clusters, k_clusters, block_map, *, layout, scale, tail):
    """See `dynamic_attention` in `__init__.py`."""
    b, h, n, d = q.shape
    rows, c_q, c_k = b * h, block_map.shape[2], block_map.shape[3]
    config = config_for_device(q.device)
    tiles = triton.cdiv(layout.video_len, config.keys)

    def empty(*shape):
        return torch.empty(rows, c_q, *shape, dtype=torch.int32, device=q.device)

    ids, ends, shifts, first_rank = empty(c_k), empty(c_k), empty(c_k), empty(tiles)
    n_selected, n_filled, n_keys = empty(), empty(), empty()
    plan_kernel[c_q, rows](
        block_map.view(torch.int8), k_clusters.offsets, ids, ends, shifts, first_rank, n_selected, n_filled, n_keys,
        c_q, c_k, tiles, BLOCK_K=max(16, triton.next_power_of_2(c_k)), BLOCK_N=config.keys,
    )  # fmt: skip

    n_text = n - layout.video_len
    bias = layout.text_bias.float().contiguous() if n_text and layout.text_bias is not None else None
    tail = None if tail is None else in_precision(tail, q.dtype)
    high, low = config.high, config.low
    for launch in launches(q_clusters.sizes, layout.video_len, high.rows, low.rows):
        tile = low if launch.rest else high
        attention_kernel[launch.most, rows](
            q, k, v, out, q_clusters.order, q_clusters.offsets, launch.ends, k_clusters.order,
            ids, ends, shifts, first_rank, n_selected, n_filled, n_keys,
            q if bias is None else bias, *((q, q, q) if tail is None else tail),
            scale * 1.4426950408889634, h, layout.video_len, layout.video_start, n_text, c_q, c_k, tiles,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            D=d, BLOCK_M=tile.rows, BLOCK_N=config.keys, BLOCK_D=max(16, triton.next_power_of_2(d)),
            BLOCK_C=max(16, triton.next_power_of_2(c_q)), REST=launch.rest, FULL=high.rows,
            HAS_TEXT=n_text > 0, HAS_BIAS=bias is not None, HAS_TAIL=tail is not None, UPCAST=INTERPRETED,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    text_queries(q, k, v, out, layout, scale)
