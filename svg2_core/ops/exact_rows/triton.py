"""Triton kernels of the exact rows: split-K over the keys, a program for each split, then a kernel that combines the partial results."""

import torch
import triton.language as tl

from ..kmeans.cold_start_triton import hashed_token
from ..near_field.triton import online_softmax_step
from ..triton_common import INTERPRETED, LOG2E, block_of, kernel
from . import EXACT_ROWS, ROLE

_SPLITS = 16  # split-K: of the keys of a head
_TILE = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


@kernel
def exact_split_kernel(
    q, k, v, text_bias, rows, partial_out, partial_sums, partial_maxima, scale, h, n, n_queries, n_video, video_start, n_text, count, seed, first_head,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    ROLE: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """rows[head, i]: which video tokens; their unnormalised answers over one split of all keys, with row sums and maxima."""
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    batch, head = row // h, row % h
    i = tl.arange(0, BLOCK_R)
    valid_rows = i < count
    token = hashed_token(tl.minimum(i, count - 1).to(tl.int64), n_queries, count, seed, ROLE, first_head + head)
    if split == 0:
        tl.store(rows + head * count + i, token, mask=valid_rows & (batch == 0))
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    dims = tl.arange(0, BLOCK_D).to(tl.int64)
    dim_mask = dims < D
    qs = tl.load(q + token[:, None] * q_n + dims[None, :] * q_d, mask=valid_rows[:, None] & dim_mask[None, :], other=0.0)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_R,), tl.float32)
    row_max = tl.full((BLOCK_R,), -1e30, tl.float32)
    split_size = tl.cdiv(n, SPLITS)
    end = tl.minimum(n, (split + 1) * split_size)
    for first in range(split * split_size, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        valid = key < end
        bias = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_BIAS:
            is_text = valid & ((key < video_start) | (key >= video_start + n_video))
            text = tl.where(key < video_start, key, key - n_video)
            bias += LOG2E * tl.load(text_bias + batch * n_text + text, mask=is_text, other=0.0)
            valid = valid & (bias > float("-inf"))
        index = key.to(tl.int64)
        ks = tl.load(k + index[None, :] * k_n + dims[:, None] * k_d, mask=valid[None, :] & dim_mask[:, None], other=0.0)
        vs = tl.load(v + index[:, None] * v_n + dims[None, :] * v_d, mask=valid[:, None] & dim_mask[None, :], other=0.0)
        acc, row_sum, row_max = online_softmax_step(qs, ks, vs, valid, bias, acc, row_sum, row_max, scale, UPCAST)
    index = (row * SPLITS + split) * BLOCK_R + i
    tl.store(partial_out + index[:, None] * D + dims[None, :], acc, mask=dim_mask[None, :])
    tl.store(partial_sums + index, row_sum)
    tl.store(partial_maxima + index, row_max)


@kernel
def exact_combine_kernel(
    partial_out, partial_sums, partial_maxima, out, count, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """out[row, i]: the partial results of all splits, combined by their maxima."""
    row = tl.program_id(0).to(tl.int64)
    i, dims = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_R,), tl.float32)
    row_max = tl.full((BLOCK_R,), -1e30, tl.float32)
    for split in range(SPLITS):
        index = (row * SPLITS + split) * BLOCK_R + i
        split_max = tl.load(partial_maxima + index)
        new_max = tl.maximum(row_max, split_max)
        rescale, weight = tl.exp2(row_max - new_max), tl.exp2(split_max - new_max)
        acc = acc * rescale[:, None] + weight[:, None] * tl.load(partial_out + index[:, None] * D + dims[None, :], mask=(dims < D)[None, :], other=0.0)
        row_sum = row_sum * rescale + weight * tl.load(partial_sums + index)
        row_max = new_max
    result = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    tl.store(out + (row * count + i)[:, None] * D + dims[None, :], result, mask=(i < count)[:, None] & (dims < D)[None, :])


@kernel
def squared_error_kernel(
    rows, exact, out, squares, h, count, o_b, o_h, o_n, o_d, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i, dims = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (i < count)[:, None] & (dims < D)[None, :]
    expected = tl.load(exact + (row * count + i)[:, None] * D + dims[None, :], mask=inside, other=0.0)
    token = tl.load(rows + row % h * count + i, mask=i < count, other=0)
    out += row // h * o_b + row % h * o_h
    result = tl.load(out + token[:, None] * o_n + dims[None, :] * o_d, mask=inside, other=0.0).to(tl.float32)
    tl.store(squares + row * 2, tl.sum(tl.sum((result - expected) * (result - expected), axis=1), axis=0))
    tl.store(squares + row * 2 + 1, tl.sum(tl.sum(expected * expected, axis=1), axis=0))


def exact_rows(q, k, v, layout, scale, seed, first_head, count):
    """See `exact_rows` in `__init__.py`: rows, out."""
    (b, h, _, d), n = q.shape, k.shape[2]
    n_text = n - layout.video_len
    bias = layout.text_bias.float().contiguous() if n_text and layout.text_bias is not None else None

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=q.device)

    rows, out = empty(h, count, dtype=torch.int64), empty(b, h, count, d)
    partials = empty(b * h, _SPLITS, EXACT_ROWS, d), empty(b * h, _SPLITS, EXACT_ROWS), empty(b * h, _SPLITS, EXACT_ROWS)
    shape = {"D": d, "BLOCK_R": EXACT_ROWS, "BLOCK_D": block_of(d), "SPLITS": _SPLITS}
    exact_split_kernel[_SPLITS, b * h](
        q[:, :, layout.video_queries], k, v, q if bias is None else bias, rows, *partials, scale * LOG2E.value, h, n, layout.queries_len,
        layout.video_len, layout.video_start, n_text, count, seed, first_head, *q.stride(), *k.stride(), *v.stride(),
        ROLE=ROLE, HAS_BIAS=bias is not None, UPCAST=INTERPRETED, **shape, **_TILE,
    )  # fmt: skip
    exact_combine_kernel[(b * h,)](*partials, out, count, **shape, num_warps=4)
    return rows, out


def squared_error(exact, out, layout):
    """See `squared_error` in `__init__.py`."""
    b, h, count, d = exact.out.shape
    squares = torch.empty(b, h, 2, dtype=torch.float32, device=out.device)
    squared_error_kernel[(b * h,)](
        exact.rows.contiguous(), exact.out.contiguous(), out[:, :, layout.video_queries], squares, h, count, *out.stride(), D=d, BLOCK_R=EXACT_ROWS, BLOCK_D=block_of(d), num_warps=4
    )
    return squares
