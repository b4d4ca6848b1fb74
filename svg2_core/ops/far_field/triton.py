"""Triton kernels of the far field: the weights of A, A itself, its coefficient, and the stand-ins merged into the near field."""

import torch
import triton
import triton.language as tl

from ..exact_rows import EXACT_ROWS
from ..moments.triton import SPLITS, within
from ..near_field.configs import FAR
from ..near_field.plan import HIGH, query_tiles
from ..near_field.triton import query_tile
from ..select.triton_by_error import logits_of_pairs
from ..triton_common import (
    INTERPRETED,
    LOG2E,
    block_of,
    cdiv,
    cluster_sizes,
    dot,
    dot_onto,
    finite,
    kernel,
    logsumexp_step,
    products_dtype,
)
from .reference import MAX_COEFFICIENT, MAX_VARIANCE_TERM

_TINY = tl.constexpr(1e-30)


@kernel
def skipped_logsumexp_kernel(
    q, k, k_offsets, log_mass, selected, logsumexp, scale, c_q, c_k,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """logsumexp[row, i] of the skipped pairs' logits at the query centroids; -inf where nothing is skipped."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    row_max = tl.full((BLOCK_I,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_I,), tl.float32)
    for first in range(0, c_k, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        logits, _ = logits_of_pairs(q, k, k_offsets, log_mass, row, i, j, c_q, c_k, scale, D, BLOCK_D, BLOCK_I, BLOCK_J)
        inside = (i < c_q)[:, None] & (j < c_k)[None, :]
        taken = tl.load(selected + (row * c_q + i)[:, None] * c_k + j[None, :], mask=inside, other=1) != 0
        logits = tl.where(taken, float("-inf"), logits)
        row_max, row_sum = logsumexp_step(row_max, row_sum, logits)
    tl.store(logsumexp + row * c_q + i, tl.where(row_sum == 0.0, float("-inf"), tl.log(row_sum) + row_max), mask=i < c_q)


@kernel
def skipped_mass_kernel(
    q, k, q_offsets, k_offsets, log_mass, selected, logsumexp, weights, scale, c_q, c_k,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """weights[row, j]: the share of a key cluster in the skipped mass, each query cluster counted with its queries."""
    row = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    mass = tl.zeros((BLOCK_J,), tl.float32)
    queries = 0.0
    for first in range(0, c_q, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        logits, _ = logits_of_pairs(q, k, k_offsets, log_mass, row, i, j, c_q, c_k, scale, D, BLOCK_D, BLOCK_I, BLOCK_J)
        inside = (i < c_q)[:, None] & (j < c_k)[None, :]
        taken = tl.load(selected + (row * c_q + i)[:, None] * c_k + j[None, :], mask=inside, other=1) != 0
        lse = tl.load(logsumexp + row * c_q + i, mask=i < c_q, other=float("-inf"))
        size = tl.where(lse == float("-inf"), 0.0, cluster_sizes(q_offsets, row, i, c_q).to(tl.float32))
        share = tl.where(taken | (lse == float("-inf"))[:, None], 0.0, tl.exp(logits - lse[:, None]))
        mass += tl.sum(share * size[:, None], axis=0)
        queries += tl.sum(size, axis=0)
    tl.store(weights + row * c_k + j, mass / tl.maximum(queries, 1.0), mask=j < c_k)


@triton.jit
def _stand_ins(
    qs, clusters, cluster, keys, k_offsets, log_mass, selected, features, direction_variances, row, j, scale, c_q, c_k,
    D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BY_ROW: tl.constexpr, ORDER: tl.constexpr,
    MAX_TERM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits, in base 2, of queries qs of one cluster (BY_ROW: of the clusters [R]) at the key clusters j; -inf where selected.

    What belongs to key clusters is addressed from its row in 32 bits, which 8,192 clusters never leave: it saves registers."""
    dims, axes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    inside = j < c_k
    size = cluster_sizes(k_offsets, row, j, c_k)
    bias = tl.log2(tl.maximum(size, 1).to(tl.float32))
    ks = tl.load(keys + row * c_k * D + (j[None, :] * D + dims[:, None]), mask=inside[None, :] & (dims < D)[:, None], other=0.0)
    if ORDER == 1:
        variances = tl.load(
            direction_variances + row * c_k * M + (j[None, :] * M + axes[:, None]), mask=inside[None, :] & (axes < M)[:, None], other=0.0
        )
        term = dot(features, (0.5 * variances).to(features.dtype), UPCAST)
        term = tl.minimum(tl.maximum(term, -MAX_TERM), MAX_TERM) * (LOG2E / scale)
        logits = dot_onto(term, qs, ks, UPCAST) * scale
    else:
        logits = dot(qs, ks, UPCAST) * scale
    if BY_ROW:
        index = (row * c_q + clusters)[:, None] * c_k + j[None, :]
        taken = (tl.load(selected + index, mask=inside[None, :], other=1) != 0) | (size == 0)[None, :]
        if ORDER == 1:
            logits += LOG2E * tl.load(log_mass + index, mask=inside[None, :], other=0.0)
        return tl.where(taken, float("-inf"), logits + bias[None, :])
    else:
        index = (row * c_q + cluster) * c_k
        taken = (tl.load(selected + index + j, mask=inside, other=1) != 0) | (size == 0)
        if ORDER == 1:
            bias += LOG2E * tl.load(log_mass + index + j, mask=inside, other=0.0)
        return logits + tl.where(taken, float("-inf"), bias)[None, :]


@triton.jit
def _online_softmax_step(acc, near_weight, far_weight, row_max, logits, values, j, c_k, dims, D: tl.constexpr, UPCAST: tl.constexpr):
    """One step of the online softmax, in base 2, over stand-ins j with a head's `values`; the row sum is near_weight +
    far_weight."""
    vs = tl.load(values + (j[:, None] * D + dims[None, :]), mask=(j < c_k)[:, None] & (dims < D)[None, :], other=0.0)
    new_max = tl.maximum(row_max, tl.max(logits, axis=1))
    p, rescale = tl.exp2(logits - new_max[:, None]), tl.exp2(row_max - new_max)
    near_weight *= rescale
    far_weight = far_weight * rescale + tl.sum(p, axis=1)  # before acc: after it, the kernel spills on sm_86
    acc = acc * rescale[:, None] + dot(p.to(vs.dtype), vs, UPCAST)
    return acc, near_weight, far_weight, new_max


@triton.jit
def _directions(directions, row, dims, axes, D: tl.constexpr, M: tl.constexpr, dtype):
    return tl.load(directions + (row * D + dims)[:, None] * M + axes[None, :], mask=(dims < D)[:, None] & (axes < M)[None, :], other=0.0).to(dtype)


@kernel
def matrix_kernel(partials, matrix, scales, factor, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """matrix[row] = A^T from its partial sums, divided by its largest magnitude; scales[row]: factor times that magnitude."""
    row = tl.program_id(0).to(tl.int64)
    dims, kk = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    largest = _TINY
    for sweep in range(0, 2):
        abs_max = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for first in range(0, D, BLOCK_K):
            ks = first + kk
            index = ks[:, None] * D + dims[None, :]
            inside = (ks < D)[:, None] & (dims < D)[None, :]
            a = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
            for s in range(0, SPLITS):
                a += tl.load(partials + (row * SPLITS + s) * D * D + index, mask=inside, other=0.0)
            abs_max = tl.maximum(abs_max, tl.abs(a))
            if sweep == 1:
                tl.store(matrix + row * D * D + index, (a / largest).to(matrix.dtype.element_ty), mask=inside)
        largest = tl.maximum(tl.max(tl.max(abs_max, axis=1), axis=0), _TINY)
    tl.store(scales + row, largest * factor)


@kernel
def fit_kernel(
    q, out, logsumexp, q_order, q_offsets, k_offsets, q_centres, keys, values, log_mass, selected, directions, direction_variances,
    matrix, rows, exact, scales, coefficients, scale, h, n, c_q, c_k, count, depth,
    q_b, q_h, q_n, q_d, o_b, o_h, o_n, o_d,
    D: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr, MAX_TERM: tl.constexpr, MAX_COEFFICIENT: tl.constexpr, UPCAST: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """coefficients[row]: of A = scales[row] * matrix[row], by least squares on the exact rows; scales[row] is multiplied by it."""
    row = tl.program_id(0).to(tl.int64)
    dims, axes, i = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    dim_mask = dims < D

    valid = i < count
    token = tl.load(rows + row % h * count + i, mask=valid, other=0).to(tl.int32)
    # Their clusters: by their positions in cluster order, the count of clusters that end before.
    position = tl.zeros((BLOCK_R,), tl.int32)
    p = tl.arange(0, BLOCK_P)
    for first in range(0, n, BLOCK_P):
        tokens = tl.load(q_order + row * n + first + p, mask=first + p < n, other=-1)
        position += tl.sum(tl.where(tokens[None, :] == token[:, None], first + p[None, :], 0), axis=1)
    clusters = tl.zeros((BLOCK_R,), tl.int32)
    for first in range(0, c_q, BLOCK_J):
        ends = tl.load(q_offsets + row * (c_q + 1) + 1 + first + tl.arange(0, BLOCK_J), mask=first + tl.arange(0, BLOCK_J) < c_q, other=2147483647)
        clusters += tl.sum((ends[None, :] <= position[:, None]).to(tl.int32), axis=1)

    q += row // h * q_b + row % h * q_h
    out += row // h * o_b + row % h * o_h
    query = token.to(tl.int64)
    columns = dims.to(tl.int64)[None, :]
    mask = valid[:, None] & dim_mask[None, :]
    qs = tl.load(q + query[:, None] * q_n + columns * q_d, mask=mask, other=0.0)
    near = tl.load(out + query[:, None] * o_n + columns * o_d, mask=mask, other=0.0).to(tl.float32)
    lse = LOG2E * tl.load(logsumexp + row * n + token, mask=valid, other=float("-inf"))
    centres = tl.load(q_centres + (row * c_q + clusters)[:, None] * D + dims[None, :], mask=mask, other=0.0)
    if FP32:
        z = _directions(directions, row, dims, axes, D, M, tl.float32)
        f = dot(qs, z, UPCAST)
        g = dot(centres, z, UPCAST)
        features = finite(f * f - g * g)
    else:
        z = _directions(directions, row, dims, axes, D, M, tl.bfloat16)
        f = dot(qs.to(tl.bfloat16), z, UPCAST)
        g = dot(centres.to(tl.bfloat16), z, UPCAST)
        features = finite(f * f - g * g).to(tl.bfloat16)
    row_max = tl.maximum(lse, -1e30)
    near_weight = tl.exp2(lse - row_max)
    far_weight = tl.zeros((BLOCK_R,), tl.float32)
    acc = near_weight[:, None] * near
    for first in range(0, c_k, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        logits = _stand_ins(
            qs, clusters, 0, keys, k_offsets, log_mass, selected, features, direction_variances, row, j, scale, c_q, c_k,
            D, M, BLOCK_D, BLOCK_M, True, 1, MAX_TERM, UPCAST,
        )  # fmt: skip
        acc, near_weight, far_weight, row_max = _online_softmax_step(acc, near_weight, far_weight, row_max, logits, values + row * c_k * D, j, c_k, dims, D, UPCAST)
    total = near_weight + far_weight
    total = tl.where(total == 0.0, 1.0, total)
    matrix_scale = tl.load(scales + row)
    correction = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in tl.range(0, depth, BLOCK_K, num_stages=1):
        ds = first + tl.arange(0, BLOCK_K)
        matrix_tile = tl.load(matrix + row * D * D + (ds[:, None] * D + dims[None, :]), mask=(ds < D)[:, None] & dim_mask[None, :], other=0.0)
        q_tile = tl.load(q + query[:, None] * q_n + ds.to(tl.int64)[None, :] * q_d, mask=valid[:, None] & (ds < D)[None, :], other=0.0)
        correction += dot(q_tile, matrix_tile, UPCAST)
    correction *= (far_weight / total * matrix_scale)[:, None]
    residual = tl.load(exact + (row * count + i)[:, None] * D + dims[None, :], mask=mask, other=0.0) - acc / total[:, None]
    correction = tl.where(mask, correction, 0.0)
    coefficient = tl.sum(tl.sum(correction * residual, axis=1), axis=0) / tl.sum(tl.sum(correction * correction, axis=1), axis=0)
    # 0 / 0: nothing was skipped, so that any coefficient serves. Or the inputs are not finite, as the result will not be.
    coefficient = tl.where(coefficient == coefficient, tl.minimum(tl.maximum(coefficient, 0.0), MAX_COEFFICIENT), 1.0)
    tl.store(coefficients + row, coefficient)
    tl.store(scales + row, coefficient * matrix_scale)


@kernel
def far_field_kernel(
    q, out, logsumexp, q_order, q_offsets, tiles, tile_counts, k_offsets, q_centres, keys, values, log_mass, selected,
    directions, direction_variances, matrix, scales,
    scale, h, n, c_q, c_k, tile_stride, depth,
    q_b, q_h, q_n, q_d, o_b, o_h, o_n, o_d,
    D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, MAX_TERM: tl.constexpr, UPCAST: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """The stand-ins of one query tile, merged into `out` in place: the near field is where the online softmax begins."""
    row = tl.program_id(1).to(tl.int64)
    cluster, tokens, inside = query_tile(tiles, tile_counts, q_order, q_offsets, row, n, c_q, tile_stride, BLOCK_M, ROWS)
    if cluster < 0:
        return
    dims, axes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_A)
    dim_mask = dims < D
    q += row // h * q_b + row % h * q_h
    out += row // h * o_b + row % h * o_h
    query = tokens.to(tl.int64)
    columns = dims.to(tl.int64)[None, :]
    mask = inside[:, None] & dim_mask[None, :]
    qs = tl.load(q + query[:, None] * q_n + columns * q_d, mask=mask, other=0.0)
    features = 0.0
    if ORDER == 1:
        centre = tl.load(q_centres + (row * c_q + cluster) * D + dims, mask=dim_mask, other=0.0)
        if FP32:
            z = _directions(directions, row, dims, axes, D, M, tl.float32)
            f = dot(qs, z, UPCAST)
        else:
            z = _directions(directions, row, dims, axes, D, M, tl.bfloat16)
            f = dot(qs.to(tl.bfloat16), z, UPCAST)
        g = tl.sum(centre[:, None] * z.to(tl.float32), axis=0)
        features = finite(f * f - (g * g)[None, :])
        if not FP32:
            features = features.to(tl.bfloat16)
    lse = LOG2E * tl.load(logsumexp + row * n + tokens, mask=inside, other=float("-inf"))
    row_max = tl.maximum(lse, -1e30)
    near_weight = tl.exp2(lse - row_max)
    far_weight = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.load(out + query[:, None] * o_n + columns * o_d, mask=mask, other=0.0).to(tl.float32) * near_weight[:, None]
    for first in range(0, c_k, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        logits = _stand_ins(
            qs, cluster, cluster, keys, k_offsets, log_mass, selected, features, direction_variances, row, j, scale, c_q, c_k,
            D, M, BLOCK_D, BLOCK_A, False, ORDER, MAX_TERM, UPCAST,
        )  # fmt: skip
        acc, near_weight, far_weight, row_max = _online_softmax_step(acc, near_weight, far_weight, row_max, logits, values + row * c_k * D, j, c_k, dims, D, UPCAST)
    total = near_weight + far_weight
    total = tl.where(total == 0.0, 1.0, total)  # nothing to attend to
    if ORDER == 1:
        # The correction far_weight * scale * (q A), accumulated onto acc by the product itself.
        correction_weight = tl.load(scales + row) * far_weight
        has_correction = correction_weight > 0
        unit = tl.where(has_correction, tl.maximum(correction_weight, total * 1e-20), 1.0)
        acc = acc / unit[:, None]
        # In slices of K, for the full matrix fills the registers; `depth` is D, but unknown at compile time: unrolled slices would, too.
        for first in tl.range(0, depth, BLOCK_K, num_stages=1):
            ds = first + tl.arange(0, BLOCK_K)
            matrix_tile = tl.load(matrix + row * D * D + (ds[:, None] * D + dims[None, :]), mask=(ds < D)[:, None] & dim_mask[None, :], other=0.0)
            q_tile = tl.load(
                q + query[:, None] * q_n + ds.to(tl.int64)[None, :] * q_d, mask=(inside & has_correction)[:, None] & (ds < D)[None, :], other=0.0
            )
            acc += dot(q_tile, matrix_tile, UPCAST)
        acc = acc * unit[:, None]
    result = tl.where((far_weight == 0.0)[:, None] & (total == 1.0)[:, None], acc, acc / total[:, None])
    tl.store(out + query[:, None] * o_n + columns * o_d, result.to(out.dtype.element_ty), mask=mask)


def far_field(q, k, v, out, logsumexp, q_clusters, k_clusters, moments, selected, *, layout, scale, order, exact):
    """See `far_field` in `__init__.py`."""
    b, h, _, d = q.shape
    c_q, c_k, rows, n = selected.shape[2], selected.shape[3], b * h, layout.queries_len
    video = [x[:, :, layout.video] for x in (k, v)]
    q, out = (x[:, :, layout.video_queries] for x in (q, out))
    taken, in_pairs = selected.view(torch.int8), {"D": d, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
    fp32 = products_dtype(q.dtype) == torch.float32

    def empty(*shape, dtype=torch.float32):
        return torch.empty(b, h, *shape, dtype=dtype, device=q.device)

    keys, values = k_clusters.centroids.to(q.dtype), moments.values.to(q.dtype).contiguous()
    coefficients = torch.zeros(b, h, dtype=torch.float32, device=q.device) if order == 0 else empty()
    scales, matrix, m = coefficients, keys, 1
    first_order_tensors = (keys, keys, keys)  # any pointers where the kernel reads none of these
    common = {"D": d, "BLOCK_D": block_of(d), "MAX_TERM": MAX_VARIANCE_TERM, "UPCAST": INTERPRETED, "FP32": fp32}
    if order == 1:
        centroids, m = (q_clusters.centroids, k_clusters.centroids), moments.directions.shape[3]
        directions, variances = moments.directions.contiguous(), moments.direction_variances.contiguous()
        if m == 0:  # kernels take no arrays of width 0
            m, directions, variances = 1, q_clusters.centroids.new_zeros(b, h, d, 1), k_clusters.centroids.new_zeros(b, h, c_k, 1)
        first_order_tensors = (moments.log_mass.contiguous(), directions, variances)
        skipped, weights, scales = empty(c_q), empty(c_k), empty()
        skipped_logsumexp_kernel[cdiv(c_q, 16), rows](
            *centroids, k_clusters.offsets, first_order_tensors[0], taken, skipped, scale, c_q, c_k, BLOCK_I=16, BLOCK_J=64, **in_pairs
        )
        skipped_mass_kernel[cdiv(c_k, 64), rows](
            *centroids, q_clusters.offsets, k_clusters.offsets, first_order_tensors[0], taken, skipped, weights, scale, c_q, c_k,
            BLOCK_I=16, BLOCK_J=64, **in_pairs,
        )  # fmt: skip
        matrix = empty(d, d, dtype=q.dtype)
        # within_kernel's weights are relative to their mean, which is 1 / keys.
        matrix_kernel[(rows,)](within(*video, k_clusters, weights), matrix, scales, scale / layout.video_len, D=d, SPLITS=SPLITS, BLOCK_D=block_of(d), BLOCK_K=16)
        fit_kernel[(rows,)](
            q, out, logsumexp, q_clusters.order, q_clusters.offsets, k_clusters.offsets, centroids[0], keys, values,
            first_order_tensors[0], taken, *first_order_tensors[1:], matrix, exact.rows.contiguous(), exact.out.contiguous(), scales, coefficients,
            scale * LOG2E.value, h, n, c_q, c_k, exact.rows.shape[1], d, *q.stride(), *out.stride(),
            M=m, BLOCK_K=min(32, block_of(d)), BLOCK_M=block_of(m), BLOCK_R=EXACT_ROWS, BLOCK_J=16, BLOCK_P=256, MAX_COEFFICIENT=MAX_COEFFICIENT,
            **common, num_warps=8, num_stages=1,
        )  # fmt: skip
    tiles, tile_counts, max_tiles_of = query_tiles(q_clusters.offsets, n)
    for tile, max_tiles, entries, tile_count in zip((FAR.high, FAR.low), max_tiles_of, tiles, tile_counts, strict=True):
        if max_tiles == 0:
            continue
        far_field_kernel[max_tiles, rows](
            q, out, logsumexp, q_clusters.order, q_clusters.offsets, entries, tile_count, k_clusters.offsets, q_clusters.centroids,
            keys, values, first_order_tensors[0], taken, *first_order_tensors[1:], matrix, scales,
            scale * LOG2E.value, h, n, c_q, c_k, entries.shape[1], d, *q.stride(), *out.stride(),
            M=m, BLOCK_A=block_of(m), BLOCK_M=tile.rows, BLOCK_N=tile.keys, BLOCK_K=min(32, block_of(d)), ROWS=HIGH, ORDER=order, **common,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return coefficients
