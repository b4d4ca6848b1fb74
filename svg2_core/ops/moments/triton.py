"""Triton kernels of the moments: the second moment within clusters for the directions, then one program per cluster."""

import torch
import triton
import triton.language as tl

from ..kmeans.metric_triton import SecondMoment, leading_directions
from ..triton_common import (
    INTERPRETED,
    block_of,
    cdiv,
    dot,
    finite,
    kernel,
    logsumexp_step,
    product_of_rows,
    products_dtype,
    stages_of_transposed,
)
from . import Moments

SPLITS = 16  # split-K: of the clusters, each summed by a program
SAMPLED = 256  # clusters a head's directions are found from at least, evenly spaced; of fewer all
_WITHIN = {"BLOCK_T": 32, "num_warps": 8}
_QUERIES = {"BLOCK_T": 32, "num_warps": 4, "num_stages": 2}
_KEYS = {"BLOCK_T": 32, "num_warps": 4, "num_stages": 2}
_BLOCK_Q = 64  # query centroids at a time


@triton.jit
def deviations(x, order, positions, end, centre, x_n, x_d, dims, D: tl.constexpr):
    """Deviations of the tokens at positions of the cluster order: finite fp32 rows less their cluster's centre, zero past the end."""
    valid = (positions < end)[:, None] & (dims < D)[None, :]
    token = tl.load(order + positions, mask=positions < end, other=0).to(tl.int64)
    rows = tl.load(x + token[:, None] * x_n + dims.to(tl.int64)[None, :] * x_d, mask=valid, other=0.0)
    return tl.where(valid, finite(rows.to(tl.float32)) - centre[None, :], 0.0), token


@kernel
def within_kernel(
    x, y, order, offsets, centres, weights, partials, n, c, step, h,
    x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    WEIGHTED: tl.constexpr, UPCAST: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """partials[row, split] = sum over tokens of every `step`-th cluster of (x - centre) (x - centre)^T; or WEIGHTED, over all
    clusters, of weight (x - centre) y^T: centring one factor is enough."""
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    x += row // h * x_b + row % h * x_h
    y += row // h * y_b + row % h * y_h
    t = tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for cluster in range(split * step, c, SPLITS * step):
        first = tl.load(offsets + row * (c + 1) + cluster)
        end = tl.load(offsets + row * (c + 1) + cluster + 1)
        centre = tl.load(centres + (row * c + cluster) * D + dims, mask=dim_mask, other=0.0)
        weight = 1.0
        if WEIGHTED:
            # Relative to the mean weight, so that 16 bits hold it.
            weight = tl.load(weights + row * c + cluster) * (n / tl.maximum(end - first, 1).to(tl.float32))
        for start in range(first, end, BLOCK_T):
            a, token = deviations(x, order + row * n, start + t, end, centre, x_n, x_d, dims, D)
            if WEIGHTED:
                inside = (start + t < end)[:, None] & dim_mask[None, :]
                b = weight * tl.load(y + token[:, None] * y_n + dims.to(tl.int64)[None, :] * y_d, mask=inside, other=0.0).to(tl.float32)
            else:
                b = a
            if not FP32:
                a = a.to(tl.bfloat16)
                b = b.to(tl.bfloat16)
            acc += dot(tl.trans(a), b, UPCAST)
    pointers = partials + ((row * SPLITS + split) * D + dims)[:, None] * D + dims[None, :]
    tl.store(pointers, acc, mask=dim_mask[:, None] & dim_mask[None, :])


@kernel
def query_variances_kernel(
    q, order, offsets, centres, variances, rounded, n, c, h, x_b, x_h, x_n, x_d, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """variances[row, cluster]: of its tokens about its centroid, by channel; rounded: the centroid in the products' precision."""
    row, cluster = tl.program_id(1).to(tl.int64), tl.program_id(0)
    q += row // h * x_b + row % h * x_h
    dims = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    first = tl.load(offsets + row * (c + 1) + cluster)
    end = tl.load(offsets + row * (c + 1) + cluster + 1)
    index = (row * c + cluster) * D + dims
    centre = tl.load(centres + index, mask=dims < D, other=0.0)
    tl.store(rounded + index, centre.to(rounded.dtype.element_ty), mask=dims < D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, end, BLOCK_T):
        d, _ = deviations(q, order + row * n, start + t, end, centre, x_n, x_d, dims, D)
        total += tl.sum(d * d, axis=0)
    tl.store(variances + index, total / tl.maximum(end - first, 1).to(tl.float32), mask=dims < D)


@kernel
def key_moments_kernel(
    k, v, order, offsets, k_centres, q_centres, for_keys,
    values, log_mass, variance, spread, key_variances, direction_variances,
    scale, n, c_q, c_k, h, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
    UPCAST: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """All moments of one key cluster: a pass over its keys and values, then one for each block of query centroids.

    variance[q, k] without the joint part of queries and keys, which `add_product_kernel` adds."""
    row, cluster = tl.program_id(1).to(tl.int64), tl.program_id(0)
    k += row // h * k_b + row % h * k_h
    v += row // h * v_b + row % h * v_h
    order += row * n
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    direction_index = tl.arange(0, BLOCK_M)
    t = tl.arange(0, BLOCK_T)
    first = tl.load(offsets + row * (c_k + 1) + cluster)
    end = tl.load(offsets + row * (c_k + 1) + cluster + 1)
    count = tl.maximum(end - first, 1).to(tl.float32)
    index = row * c_k + cluster
    centre = tl.load(k_centres + index * D + dims, mask=dim_mask, other=0.0)
    projection = tl.load(for_keys + (row * D + dims)[:, None] * M + direction_index[None, :], mask=dim_mask[:, None] & (direction_index < M)[None, :], other=0.0)

    # Values relative to the cluster's first one, so that a common offset costs no precision.
    filled = end > first
    first_token = tl.load(order + first, mask=filled, other=0).to(tl.int64)
    origin = tl.load(v + first_token * v_n + dims.to(tl.int64) * v_d, mask=dim_mask & filled, other=0.0).to(tl.float32)
    per_channel = tl.zeros((BLOCK_D,), tl.float32)
    per_direction = tl.zeros((BLOCK_M,), tl.float32)
    value = tl.zeros((BLOCK_D,), tl.float32)
    square = 0.0
    for start in range(first, end, BLOCK_T):
        positions = start + t
        dk, token = deviations(k, order, positions, end, centre, k_n, k_d, dims, D)
        per_channel += tl.sum(dk * dk, axis=0)
        projected = dot(dk, projection, UPCAST) if FP32 else dot(dk.to(tl.bfloat16), projection.to(tl.bfloat16), UPCAST)
        per_direction += tl.sum(projected * projected, axis=0)
        inside = (positions < end)[:, None] & dim_mask[None, :]
        dv = tl.load(v + token[:, None] * v_n + dims.to(tl.int64)[None, :] * v_d, mask=inside, other=0.0).to(tl.float32)
        dv = tl.where(inside, dv - origin[None, :], 0.0)
        value += tl.sum(dv, axis=0)
        square += tl.sum(tl.sum(dv * dv, axis=1), axis=0)
    tl.store(key_variances + index * D + dims, per_channel / count, mask=dim_mask)
    tl.store(direction_variances + index * M + direction_index, per_direction / count, mask=direction_index < M)
    value /= count
    tl.store(values + index * D + dims, value + origin, mask=dim_mask)
    residual = square / count - tl.sum(value * value, axis=0)
    tl.store(spread + index, tl.sqrt(tl.where(residual < 0, 0.0, residual)))  # NaN stays NaN

    for q_first in range(0, c_q, BLOCK_Q):
        qs = q_first + tl.arange(0, BLOCK_Q)
        centroids = tl.load(
            q_centres + (row * c_q + qs)[:, None] * D + dims[None, :], mask=(qs < c_q)[:, None] & dim_mask[None, :], other=0.0
        )
        row_max = tl.full((BLOCK_Q,), -1e30, tl.float32)
        row_sum = tl.zeros((BLOCK_Q,), tl.float32)
        squares = tl.zeros((BLOCK_Q,), tl.float32)
        for start in range(first, end, BLOCK_T):
            dk, _ = deviations(k, order, start + t, end, centre, k_n, k_d, dims, D)
            if not FP32:
                dk = dk.to(tl.bfloat16)
            logits = dot(centroids, tl.trans(dk), UPCAST) * scale  # zero past the end
            squares += tl.sum(logits * logits, axis=1)
            logits = tl.where((start + t < end)[None, :], logits, float("-inf"))
            row_max, row_sum = logsumexp_step(row_max, row_sum, logits)
        pair_index = (row * c_q + qs) * c_k + cluster
        mass = tl.where(filled, tl.log(row_sum / count) + row_max, 0.0)
        tl.store(log_mass + pair_index, mass, mask=qs < c_q)
        tl.store(variance + pair_index, squares / count, mask=qs < c_q)


@kernel
def add_product_kernel(
    variance, q_variances, k_variances, factor, c_q, c_k, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """variance += factor * q_variances k_variances^T: the joint deviations of queries and keys from their centroids."""
    row = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = product_of_rows(q_variances, k_variances, row, i, j, c_q, c_k, D, BLOCK_D, BLOCK_Q, BLOCK_K)
    pointers = variance + (row * c_q + i)[:, None] * c_k + j[None, :]
    inside = (i < c_q)[:, None] & (j < c_k)[None, :]
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + factor * acc, mask=inside)


def within(x, y, clusters, weights=None, step=1) -> torch.Tensor:
    """within_kernel for all heads: fp32 `[B, H, SPLITS, D, D]`, to be summed over the splits."""
    b, h, n, d = x.shape
    partials = torch.empty(b, h, SPLITS, d, d, dtype=torch.float32, device=x.device)
    within_kernel[SPLITS, b * h](
        x, y, clusters.order, clusters.offsets, clusters.centroids, partials if weights is None else weights, partials,
        n, clusters.centroids.shape[2], step, h, *x.stride(), *y.stride(),
        SPLITS=SPLITS, D=d, BLOCK_D=block_of(d), WEIGHTED=weights is not None, UPCAST=INTERPRETED,
        FP32=products_dtype(x.dtype) == torch.float32, num_stages=stages_of_transposed(x.device), **_WITHIN,
    )  # fmt: skip
    return partials


def moments(q, k, v, q_clusters, k_clusters, scale, directions):
    """See `moments` in `__init__.py`."""
    (b, h, n_queries, d), n = q.shape, k.shape[2]
    c_q, c_k, rows = q_clusters.centroids.shape[2], k_clusters.centroids.shape[2], b * h
    shape, fp32 = {"D": d, "BLOCK_D": block_of(d)}, products_dtype(q.dtype) == torch.float32
    m = directions or min(1, d)  # kernels take no arrays of width 0

    def empty(*shape):
        return torch.empty(b, h, *shape, dtype=torch.float32, device=q.device)

    of_q = SecondMoment(q)
    of_k = within(k, k, k_clusters, step=max(1, c_k // SAMPLED))
    for_keys, for_queries = leading_directions(
        k, (of_k, of_k, of_k), 1, of_q.tensors, of_q.count, m, scale, ("given", "moment")
    )  # the covariance's magnitude does not matter
    q_variances, k_variances = empty(c_q, d), empty(c_k, d)
    rounded = torch.empty(b, h, c_q, d, dtype=products_dtype(q.dtype), device=q.device)
    query_variances_kernel[c_q, rows](
        q, q_clusters.order, q_clusters.offsets, q_clusters.centroids, q_variances, rounded, n_queries, c_q, h, *q.stride(), **shape, **_QUERIES
    )
    known = Moments(empty(c_k, d), empty(c_q, c_k), empty(c_q, c_k), empty(c_k), for_queries, empty(c_k, m))
    key_moments_kernel[c_k, rows](
        k, v, k_clusters.order, k_clusters.offsets, k_clusters.centroids, rounded, for_keys,
        known.values, known.log_mass, known.variance, known.spread, k_variances, known.direction_variances,
        scale, n, c_q, c_k, h, *k.stride(), *v.stride(),
        M=m, BLOCK_M=block_of(m), BLOCK_Q=_BLOCK_Q, UPCAST=INTERPRETED, FP32=fp32, **shape, **_KEYS,
    )  # fmt: skip
    add_product_kernel[cdiv(c_q, 32), cdiv(c_k, 32), rows](
        known.variance, q_variances, k_variances, scale**2, c_q, c_k, D=d, BLOCK_Q=32, BLOCK_K=32, BLOCK_D=16, num_warps=4, num_stages=2
    )
    return known._replace(directions=for_queries[..., :directions], direction_variances=known.direction_variances[..., :directions])
