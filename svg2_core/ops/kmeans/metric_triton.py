"""Triton kernels of the metric (metric.py): second moments of a sample of tokens, and the leading directions.

The subspace iteration of one head is one program. It waits for nothing and depends on no other head, which solvers of a library
do not promise. All in fp32, with a jitter to match, where metric.py has fp64.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import INTERPRETED, block_of, dot, finite, kernel, products_dtype, stages_of_transposed
from .cold_start_triton import mix
from .metric import ITERATIONS, LogitSpace

SAMPLE = 8192  # tokens that second moments are taken over, evenly spaced; all where there are fewer
_SPLITS = 4  # split-K: of a sample, each summed by a program
_JITTER = tl.constexpr(1e-6)
# Of a factorisation: less is rounding, which divided by itself would grow from column to column. A column below it comes
# out shorter than one, and is normalised in the next round.
_LEAST_PIVOT = tl.constexpr(1e-3)
_TINY = tl.constexpr(1e-30)


@kernel
def sample_moment_kernel(
    x, partials, sums, shifts, n, samples, h, x_b, x_h, x_n, x_d,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """partials[row, split] = sum of (x - shift)(x - shift)^T over a split of the sample; sums of x - shift. The shift, a mean of a
    few tokens, keeps a common offset from costing precision."""
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    x += row // h * x_b + row % h * x_h
    t = tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    columns = dims.to(tl.int64)[None, :] * x_d
    shift_tokens = t.to(tl.int64) * n // BLOCK_T
    shift = tl.sum(finite(tl.load(x + shift_tokens[:, None] * x_n + columns, mask=dim_mask[None, :], other=0.0).to(tl.float32)), axis=0) / BLOCK_T
    acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    split_size = tl.cdiv(samples, SPLITS)
    for first in range(split * split_size, tl.minimum(samples, (split + 1) * split_size), BLOCK_T):
        i = first + t
        valid = (i < samples) & (i < (split + 1) * split_size)
        token = i.to(tl.int64) * n // samples
        rows = tl.load(x + token[:, None] * x_n + columns, mask=valid[:, None] & dim_mask[None, :], other=0.0).to(tl.float32)
        rows = tl.where(valid[:, None] & dim_mask[None, :], finite(rows) - shift[None, :], 0.0)
        total += tl.sum(rows, axis=0)
        rounded = rows if FP32 else rows.to(tl.bfloat16)
        acc += dot(tl.trans(rounded), rounded, UPCAST)
    index = row * SPLITS + split
    tl.store(
        partials + (index * D + dims)[:, None] * D + dims[None, :], acc, mask=dim_mask[:, None] & dim_mask[None, :]
    )
    tl.store(sums + index * D + dims, total, mask=dim_mask)
    tl.store(shifts + row * D + dims, shift, mask=dim_mask)


@triton.jit
def _matrix(
    partials, sums, shifts, row, count, out,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Write a symmetric matrix, divided by its magnitude, to `out`; -> the magnitude, the mean of its diagonal.

    KIND: "covariance" about the mean, "moment" about zero, "given" the sum of the partials, divided by the count."""
    dims = tl.arange(0, BLOCK_D)
    kk = tl.arange(0, BLOCK_K)
    dim_mask = dims < D
    mean = tl.zeros((BLOCK_D,), tl.float32)
    if KIND != "given":
        for s in range(SPLITS):
            mean += tl.load(sums + (row * SPLITS + s) * D + dims, mask=dim_mask, other=0.0)
        mean /= count
    trace = 0.0
    for sweep in range(2):
        magnitude = tl.maximum(trace / D, _TINY)
        for first in range(0, D, BLOCK_K):
            rows = first + kk
            inside = (rows < D)[:, None] & dim_mask[None, :]
            m = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
            for s in range(SPLITS):
                m += tl.load(partials + ((row * SPLITS + s) * D + rows)[:, None] * D + dims[None, :], mask=inside, other=0.0)
            m /= count
            if KIND != "given":
                row_mean = tl.zeros((BLOCK_K,), tl.float32)
                for s in range(SPLITS):
                    row_mean += tl.load(sums + (row * SPLITS + s) * D + rows, mask=rows < D, other=0.0)
                row_mean /= count
                m -= row_mean[:, None] * mean[None, :]
                if KIND == "moment":
                    row_mean += tl.load(shifts + row * D + rows, mask=rows < D, other=0.0)
                    column_mean = mean + tl.load(shifts + row * D + dims, mask=dim_mask, other=0.0)
                    m += row_mean[:, None] * column_mean[None, :]
            if sweep == 0:
                trace += tl.sum(tl.sum(tl.where(rows[:, None] == dims[None, :], m, 0.0), axis=1), axis=0)
            else:
                tl.store(out + rows[:, None] * D + dims[None, :], m / magnitude, mask=inside)
    tl.debug_barrier()
    return tl.maximum(trace / D, _TINY)


@triton.jit
def _store_scratch(scratch, x, ROWS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Write x [BLOCK_I, BLOCK_J] to scratch memory, from where a product reads it in slices of K."""
    i, j = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    tl.debug_barrier()
    tl.store(scratch + i[:, None] * BLOCK_J + j[None, :], x, mask=(i < ROWS)[:, None])
    tl.debug_barrier()


@triton.jit
def _product(
    a, a_i, a_k, b, b_k, b_j, ROWS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """a b of matrices in memory, by their strides: a has ROWS rows, b is BLOCK_J wide. In fp32, and in slices of K that fit into registers:
    tensor cores would need three products for it."""
    i, j, kk = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for first in range(0, DEPTH, BLOCK_K):
        ks = first + kk
        left = tl.load(a + i[:, None] * a_i + ks[None, :] * a_k, mask=(i < ROWS)[:, None] & (ks < DEPTH)[None, :], other=0.0)
        right = tl.load(b + ks[:, None] * b_k + j[None, :] * b_j, mask=(ks < DEPTH)[:, None], other=0.0)
        acc += tl.dot(left, right, input_precision="ieee")
    return acc


@triton.jit
def _store_inverse_cholesky(gram, scratch, BLOCK_R: tl.constexpr):
    """Write the inverse of a symmetric positive matrix's Cholesky factor, regularised, to scratch memory. Scaled to a unit diagonal
    first; the factor and its inverse come of the same row operations, side by side."""
    i, j = tl.arange(0, BLOCK_R), tl.arange(0, 2 * BLOCK_R)
    same = i[:, None] == i[None, :]
    # Of a matrix of low rank, rounding can make a diagonal entry negative.
    scale = tl.rsqrt(tl.maximum(tl.sum(tl.where(same, gram, 0.0), axis=1), 0.0) + _JITTER)
    _store_scratch(scratch, gram * scale[:, None] * scale[None, :] + tl.where(same, _JITTER, 0.0), BLOCK_R, BLOCK_R, BLOCK_R)
    rows = tl.load(scratch + i[:, None] * BLOCK_R + j[None, :], mask=(j < BLOCK_R)[None, :], other=0.0)
    rows = tl.where(j[None, :] - BLOCK_R == i[:, None], scale[:, None], rows)
    for k in range(0, BLOCK_R):
        column = tl.sum(tl.where(j[None, :] == k, rows, 0.0), axis=1)
        is_pivot = i == k
        r = tl.rsqrt(tl.maximum(tl.sum(tl.where(is_pivot, column, 0.0), axis=0), _LEAST_PIVOT))
        pivot = tl.sum(tl.where(is_pivot[:, None], rows, 0.0), axis=0) * r
        below = tl.where(i > k, column * r, 0.0)
        rows = tl.where(is_pivot[:, None], pivot[None, :], rows - below[:, None] * pivot[None, :])
    tl.debug_barrier()
    tl.store(scratch + i[:, None] * BLOCK_R + (j - BLOCK_R)[None, :], rows, mask=(j >= BLOCK_R)[None, :])
    tl.debug_barrier()


@triton.jit
def _orthonormal(z, metric, scratch, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """The columns of z, orthonormalised in a metric by a Cholesky factorisation of their Gram matrix."""
    z *= tl.rsqrt(tl.maximum(tl.sum(z * z, axis=0), _TINY))[None, :]
    product, factor = scratch + D * BLOCK_R, scratch + 2 * D * BLOCK_R
    _store_scratch(scratch, z, D, BLOCK_D, BLOCK_R)
    _store_scratch(product, _product(metric, D, 1, scratch, BLOCK_R, 1, D, D, BLOCK_D, BLOCK_R, BLOCK_K), D, BLOCK_D, BLOCK_R)
    gram = _product(scratch, 1, BLOCK_R, product, BLOCK_R, 1, BLOCK_R, D, BLOCK_R, BLOCK_R, BLOCK_K)
    _store_inverse_cholesky(gram, factor, BLOCK_R)
    return _product(scratch, BLOCK_R, 1, factor, 1, BLOCK_R, D, BLOCK_R, BLOCK_D, BLOCK_R, BLOCK_K)


@triton.jit
def _matmul(matrix, z, scratch, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """A [D, D] matrix in memory times z."""
    _store_scratch(scratch, z, D, BLOCK_D, BLOCK_R)
    return _product(matrix, D, 1, scratch, BLOCK_R, 1, D, D, BLOCK_D, BLOCK_R, BLOCK_K)


@kernel
def directions_kernel(
    x, c_partials, c_sums, c_shifts, m_partials, m_sums, m_shifts, past, workspace,
    projection, directions, largest, projected_mean, means, transfer, scale, c_count, m_count,
    C_SPLITS: tl.constexpr, M_SPLITS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    COVARIANCE: tl.constexpr, METRIC: tl.constexpr, AS_SPACE: tl.constexpr, HAS_PAST: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """One head's leading directions of a covariance in a metric (see metric.leading_directions).

    projection = scale P; AS_SPACE: the other fields of LogitSpace (largest, projected_mean, means), and with a past the
    transfer from it; else directions = Z."""
    row = tl.program_id(0).to(tl.int64)
    workspace += row * (2 * D * D + 2 * D * BLOCK_R + 2 * BLOCK_R * BLOCK_R)
    covariance, metric, scratch = workspace, workspace + D * D, workspace + 2 * D * D
    _matrix(c_partials, c_sums, c_shifts, row, c_count, covariance, C_SPLITS, D, BLOCK_D, BLOCK_K, COVARIANCE)
    magnitude = tl.sqrt(_matrix(m_partials, m_sums, m_shifts, row, m_count, metric, M_SPLITS, D, BLOCK_D, BLOCK_K, METRIC))
    dims = tl.arange(0, BLOCK_D)
    rs = tl.arange(0, BLOCK_R)
    # A fixed basis in general position.
    z = mix((dims.to(tl.int64)[:, None] * BLOCK_R + rs[None, :] + 1) * 0x9E3779B9 & 0xFFFFFFFF).to(tl.float32) / 2147483648.0 - 1.0
    z = tl.where((dims < D)[:, None], z, 0.0)
    for iteration in range(0, ITERATIONS + 2):  # orthonormal twice at the end: an ill-conditioned basis keeps a remainder
        z = _orthonormal(z, metric, scratch, D, BLOCK_D, BLOCK_K, BLOCK_R)
        if iteration < ITERATIONS:
            z = _matmul(metric, z, scratch, D, BLOCK_D, BLOCK_K, BLOCK_R)
            z = _matmul(covariance, z, scratch, D, BLOCK_D, BLOCK_K, BLOCK_R)
    valid = (dims < D)[:, None] & (rs < R)[None, :]
    p = tl.where(valid, finite(_matmul(metric, z, scratch, D, BLOCK_D, BLOCK_K, BLOCK_R) * magnitude * scale), 0.0)
    index = (row * D + dims)[:, None] * R + rs[None, :]
    tl.store(projection + index, p, mask=valid)
    if AS_SPACE:
        abs_max = tl.maximum(tl.max(tl.max(tl.abs(p), axis=1), axis=0), _TINY)
        tl.store(largest + row, abs_max)
        mean = tl.load(c_shifts + row * D + dims, mask=dims < D, other=0.0)
        for s in range(C_SPLITS):
            mean += tl.load(c_sums + (row * C_SPLITS + s) * D + dims, mask=dims < D, other=0.0) / c_count
        tl.store(means + row * D + dims, mean, mask=dims < D)
        # As tokens will be projected: with the projection in their precision.
        rounded = (p / abs_max).to(x.dtype.element_ty).to(tl.float32)
        tl.store(projected_mean + row * R + rs, tl.sum(mean[:, None] * rounded, axis=0) * abs_max, mask=rs < R)
        if HAS_PAST:
            old = tl.load(past + index, mask=valid, other=0.0).to(tl.float32)
            old /= tl.maximum(tl.max(tl.max(tl.abs(old), axis=1), axis=0), _TINY)  # no scale of the past's over- or underflows
            product, factor, rhs = scratch + D * BLOCK_R, scratch + 2 * D * BLOCK_R, scratch + 2 * D * BLOCK_R + BLOCK_R * BLOCK_R
            # The regression of the new points on the old ones: (old^T C old)^-1 old^T C p.
            _store_scratch(product, _matmul(covariance, old, scratch, D, BLOCK_D, BLOCK_K, BLOCK_R), D, BLOCK_D, BLOCK_R)
            gram = _product(scratch, 1, BLOCK_R, product, BLOCK_R, 1, BLOCK_R, D, BLOCK_R, BLOCK_R, BLOCK_K)
            gram_scale = tl.maximum(tl.sum(tl.sum(tl.where(rs[:, None] == rs[None, :], gram, 0.0), axis=1), axis=0) / R, _TINY)
            _store_inverse_cholesky(gram / gram_scale, factor, BLOCK_R)
            _store_scratch(scratch, p / abs_max, D, BLOCK_D, BLOCK_R)
            rhs_tile = _product(product, 1, BLOCK_R, scratch, BLOCK_R, 1, BLOCK_R, D, BLOCK_R, BLOCK_R, BLOCK_K)  # C is symmetric
            _store_scratch(rhs, rhs_tile / gram_scale, BLOCK_R, BLOCK_R, BLOCK_R)
            rhs_tile = _product(factor, BLOCK_R, 1, rhs, BLOCK_R, 1, BLOCK_R, BLOCK_R, BLOCK_R, BLOCK_R, BLOCK_K)
            _store_scratch(rhs, rhs_tile, BLOCK_R, BLOCK_R, BLOCK_R)
            solution = _product(factor, 1, BLOCK_R, rhs, BLOCK_R, 1, BLOCK_R, BLOCK_R, BLOCK_R, BLOCK_R, BLOCK_K)
            old_projection = tl.load(past + index, mask=valid, other=0.0).to(tl.float32)
            solution *= abs_max / tl.maximum(tl.max(tl.max(tl.abs(old_projection), axis=1), axis=0), _TINY)
            inside = (rs < R)[:, None] & (rs < R)[None, :]
            tl.store(transfer + (row * R + rs)[:, None] * R + rs[None, :], finite(solution), mask=inside)
    else:
        tl.store(directions + index, finite(z / magnitude), mask=valid)


class SecondMoment:
    """The second moment of one sample of tokens `[B, H, N, D]`, as partial sums about a shift. count: of tokens in it."""

    def __init__(self, x: torch.Tensor):
        b, h, n, d = x.shape
        self.x, self.count = x, min(n, SAMPLE)
        self.partials, self.sums, self.shifts = (
            torch.empty(b * h, *shape, dtype=torch.float32, device=x.device) for shape in ((_SPLITS, d, d), (_SPLITS, d), (d,))
        )
        sample_moment_kernel[_SPLITS, b * h](
            x, self.partials, self.sums, self.shifts, n, self.count, h, *x.stride(),
            SPLITS=_SPLITS, D=d, BLOCK_T=32, BLOCK_D=block_of(d), UPCAST=INTERPRETED, FP32=products_dtype(x.dtype) == torch.float32,
            num_warps=8, num_stages=stages_of_transposed(x.device),
        )  # fmt: skip

    @property
    def tensors(self):
        return self.partials, self.sums, self.shifts


def leading_directions(x, covariance, c_count, metric, m_count, rank, scale, kinds, past=None, as_space=False):
    """directions_kernel for all heads of x: -> projection, directions; or with as_space a LogitSpace."""
    b, h, _, d = x.shape
    block_r = max(32, block_of(rank))  # oversampled directions make the iteration converge faster, and one kernel serves both uses

    def empty(*shape):
        return torch.empty(b, h, *shape, dtype=torch.float32, device=x.device)

    projection, workspace = empty(d, rank), empty(2 * d * d + 2 * d * block_r + 2 * block_r**2)
    found = (projection,) * 5  # those that the kernel does not write
    if as_space:
        found = (projection, empty(), empty(rank), empty(d), projection if past is None else empty(rank, rank))
    directions = projection if as_space else empty(d, rank)
    directions_kernel[(b * h,)](
        x, *covariance, *metric, projection if past is None else past.contiguous(), workspace, projection, directions, *found[1:],
        scale, c_count, m_count, C_SPLITS=covariance[0].shape[-3], M_SPLITS=metric[0].shape[-3], D=d, R=rank, BLOCK_D=block_of(d), BLOCK_K=16, BLOCK_R=block_r,
        COVARIANCE=kinds[0], METRIC=kinds[1], AS_SPACE=as_space, HAS_PAST=past is not None, ITERATIONS=ITERATIONS,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    if not as_space:
        return projection, directions
    return LogitSpace(projection, found[3], None if past is None else found[4], found[1], found[2])


def logit_spaces(q, k, rank: int, scale: float, past):
    """See `logit_spaces` in `__init__.py`."""
    of_q, of_k = SecondMoment(q), SecondMoment(k)
    kinds = ("covariance", "covariance"), ("covariance", "moment")
    return tuple(
        leading_directions(
            q, mine.tensors, mine.count, other.tensors, other.count, rank, scale, kind, past[i], as_space=True
        )
        for i, (mine, other, kind) in enumerate(((of_q, of_k, kinds[0]), (of_k, of_q, kinds[1])))
    )
