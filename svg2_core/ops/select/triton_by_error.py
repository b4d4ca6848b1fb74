"""Triton kernels of the rule of errors: one threshold per head, by a radix select over the bits of the pairs' worth.

A worth of at least zero orders like its own bits. Three histograms, of 11, 10 and 10 bits, lead to the exact worth at which the
budget ends; of the pairs tied at it, the first ones are taken. Counters are integers, so that their order does not matter.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import cdiv, cluster_sizes, kernel, logsumexp_step, product_of_rows

_TOP = tl.constexpr(2048)  # bins of the first histogram, of the other two half as many
_NEXT = tl.constexpr(1024)


@triton.jit
def logits_of_pairs(q, k, k_offsets, log_mass, row, i, j, c_q, c_k, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):  # fmt: skip
    """scale q_i.k_j + log n_j + log_mass in fp32, -inf for an empty key cluster; and the key clusters' sizes."""
    acc = product_of_rows(q, k, row, i, j, c_q, c_k, D, BLOCK_D, BLOCK_I, BLOCK_J)
    size = cluster_sizes(k_offsets, row, j, c_k)
    inside = (i < c_q)[:, None] & (j < c_k)[None, :]
    logits = acc * scale + tl.log(tl.maximum(size, 1).to(tl.float32))[None, :]
    logits += tl.load(log_mass + (row * c_q + i)[:, None] * c_k + j[None, :], mask=inside, other=0.0)
    return tl.where((size > 0)[None, :], logits, float("-inf")), size


@kernel
def worth_kernel(
    q, k, q_offsets, k_offsets, log_mass, variance, spread, worth, counters, scale, c_q, c_k,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, DROPPED: tl.constexpr,
    TOP: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """worth[row, i, j] of a pair per key; -1 where a cluster is empty, infinite where it is not a number. DROPPED: infinite too
    for the pair that is worth most to a query cluster. And the histograms' counters are set to zero."""
    row = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) == 0:
        for first in range(0, TOP + 2 * NEXT, NEXT):
            tl.store(counters + row * (TOP + 2 * NEXT) + first + tl.arange(0, NEXT), tl.zeros((NEXT,), tl.int64))
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    row_max = tl.full((BLOCK_I,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_I,), tl.float32)
    for first in range(0, c_k, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        logits, _ = logits_of_pairs(q, k, k_offsets, log_mass, row, i, j, c_q, c_k, scale, D, BLOCK_D, BLOCK_I, BLOCK_J)
        row_max, row_sum = logsumexp_step(row_max, row_sum, logits)
    q_size = cluster_sizes(q_offsets, row, i, c_q)
    best = tl.full((BLOCK_I,), -1.0, tl.float32)
    best_at = tl.zeros((BLOCK_I,), tl.int32)
    for first in range(0, c_k, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        logits, size = logits_of_pairs(q, k, k_offsets, log_mass, row, i, j, c_q, c_k, scale, D, BLOCK_D, BLOCK_I, BLOCK_J)
        mass = tl.exp(logits - row_max[:, None]) / row_sum[:, None]
        at = (row * c_q + i)[:, None] * c_k + j[None, :]
        inside = (i < c_q)[:, None] & (j < c_k)[None, :]
        value = mass / tl.maximum(size, 1).to(tl.float32)[None, :]
        if not DROPPED:
            value = mass * tl.load(variance + at, mask=inside, other=0.0) * tl.load(spread + row * c_k + j, mask=j < c_k, other=0.0)[None, :]
            value /= tl.maximum(size, 1).to(tl.float32)[None, :]
        value = tl.where(value == value, value, float("inf"))
        value = tl.maximum(value, 0.0)  # no -0.0, whose bits are not in order
        value = tl.where((q_size > 0)[:, None] & (size > 0)[None, :], value, -1.0)
        tl.store(worth + at, value, mask=inside)
        if DROPPED:
            value = tl.where(inside, value, -2.0)
            most = tl.max(value, axis=1)
            where = tl.argmax(value, axis=1) + first
            best_at = tl.where(most > best, where, best_at)
            best = tl.maximum(most, best)
    if DROPPED:
        tl.debug_barrier()
        tl.store(worth + (row * c_q + i) * c_k + best_at, tl.full((BLOCK_I,), float("inf"), tl.float32), mask=(i < c_q) & (best >= 0))


@triton.jit
def _edge(counters, budget, BINS: tl.constexpr):
    """The highest bin that, with all above it, exceeds the budget, -1 where none does; and the remaining budget for it."""
    bins = tl.arange(0, BINS)
    held = tl.load(counters + bins)
    from_above = tl.sum(held, axis=0) - tl.cumsum(held, axis=0) + held  # of this one and those above
    over = from_above > budget
    edge = tl.sum(over.to(tl.int32), axis=0) - 1  # from_above falls, so that those over are the first ones
    above = tl.sum(tl.where(bins == edge, from_above - held, 0), axis=0)
    return edge, tl.where(edge >= 0, budget - above, budget)


@triton.jit
def _threshold(counters, row, budget, LEVEL: tl.constexpr, TOP: tl.constexpr, NEXT: tl.constexpr):
    """The leading bits, after LEVEL histograms, of the worth at which the budget ends, -1 where all fit; and the remaining budget."""
    counters += row * (TOP + 2 * NEXT)
    bits = 0
    if LEVEL > 0:
        bits, budget = _edge(counters, budget, TOP)
    if LEVEL > 1:
        edge, left = _edge(counters + TOP, budget, NEXT)
        budget = tl.where(bits >= 0, left, budget)
        bits = tl.where(bits >= 0, bits * NEXT + edge, -1)
    if LEVEL > 2:
        edge, left = _edge(counters + TOP + NEXT, budget, NEXT)
        budget = tl.where(bits >= 0, left, budget)
        bits = tl.where(bits >= 0, bits * NEXT + edge, -1)
    return bits, budget


@triton.jit
def _pairs(q_offsets, k_offsets, row, i, j, c_q, c_k):
    """Pairs of tokens of one query cluster and of key clusters: int64."""
    return cluster_sizes(q_offsets, row, i, c_q).to(tl.int64) * cluster_sizes(k_offsets, row, j, c_k).to(tl.int64)


@kernel
def count_pairs_kernel(
    worth, q_offsets, k_offsets, counters, budget, c_q, c_k, BLOCK_J: tl.constexpr, LEVEL: tl.constexpr, TOP: tl.constexpr, NEXT: tl.constexpr
):  # fmt: skip
    """A histogram of pairs of tokens by the next bits of their worth, of those whose leading bits are the threshold's."""
    row, i = tl.program_id(1).to(tl.int64), tl.program_id(0)
    bits, _ = _threshold(counters, row, budget, LEVEL, TOP, NEXT)
    for first in range(0, c_k, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        pair_bits = tl.load(worth + (row * c_q + i) * c_k + j, mask=j < c_k, other=-1.0).to(tl.int32, bitcast=True)
        pairs = _pairs(q_offsets, k_offsets, row, i, j, c_q, c_k)
        valid = pair_bits >= 0
        if LEVEL == 0:
            bin = pair_bits >> 20
        elif LEVEL == 1:
            valid = valid & ((pair_bits >> 20) == bits)
            bin = TOP + ((pair_bits >> 10) & (NEXT - 1))
        else:
            valid = valid & ((pair_bits >> 10) == bits)
            bin = TOP + NEXT + (pair_bits & (NEXT - 1))
        tl.atomic_add(counters + row * (TOP + 2 * NEXT) + bin, pairs, mask=valid, sem="relaxed")


@kernel
def ties_kernel(worth, q_offsets, k_offsets, counters, ties, budget, c_q, c_k, BLOCK_J: tl.constexpr, TOP: tl.constexpr, NEXT: tl.constexpr):
    """ties[row, i]: pairs of tokens of a query cluster that are tied at the threshold."""
    row, i = tl.program_id(1).to(tl.int64), tl.program_id(0)
    bits, _ = _threshold(counters, row, budget, 3, TOP, NEXT)
    tied = tl.zeros((1,), tl.int64)
    for first in range(0, c_k, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        pair_bits = tl.load(worth + (row * c_q + i) * c_k + j, mask=j < c_k, other=-1.0).to(tl.int32, bitcast=True)
        pairs = _pairs(q_offsets, k_offsets, row, i, j, c_q, c_k)
        tied += tl.sum(tl.where((pair_bits >= 0) & (pair_bits == bits), pairs, 0), axis=0)
    tl.store(ties + row * c_q + i + tl.arange(0, 1), tied)


@kernel
def choose_kernel(
    worth, q_offsets, k_offsets, counters, ties, variance, values, selected, errors, budget, n, c_q, c_k,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, DROPPED: tl.constexpr, ALL: tl.constexpr,
    TOP: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """selected[row, i, j]; errors[row, i]: the query cluster's share of the expected error, squared."""
    row, i = tl.program_id(1).to(tl.int64), tl.program_id(0)
    bits, budget = _threshold(counters, row, budget, 3, TOP, NEXT)
    others = tl.arange(0, BLOCK_I)
    before = tl.sum(tl.load(ties + row * c_q + others, mask=others < i, other=0), axis=0)
    size = cluster_sizes(q_offsets, row, i, c_q)
    error = 0.0
    for first in range(0, c_k, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        at = (row * c_q + i) * c_k + j
        value = tl.load(worth + at, mask=j < c_k, other=-1.0)
        pair_bits = value.to(tl.int32, bitcast=True)
        pairs = _pairs(q_offsets, k_offsets, row, i, j, c_q, c_k)
        valid = pair_bits >= 0
        tied = tl.where(valid & (pair_bits == bits), pairs, 0)
        fits = before + tl.cumsum(tied, axis=0) <= budget
        before += tl.sum(tied, axis=0)
        chosen = valid & ((pair_bits > bits) | ((pair_bits == bits) & fits))
        if DROPPED:
            chosen = chosen | (value == float("inf"))
        if ALL:
            chosen = valid
        tl.store(selected + at, chosen.to(tl.int8), mask=j < c_k)
        # The loss from the worth: mass is not kept.
        k_size = cluster_sizes(k_offsets, row, j, c_k).to(tl.float32)
        if DROPPED:
            norms = tl.zeros((BLOCK_J,), tl.float32)
            for d in range(0, D, BLOCK_D):
                dims = d + tl.arange(0, BLOCK_D)
                x = tl.load(values + (row * c_k + j)[:, None] * D + dims[None, :], mask=(j < c_k)[:, None] & (dims < D)[None, :], other=0.0)
                norms += tl.sum(x * x, axis=1)
            loss = value * k_size * tl.sqrt(norms)
        else:
            var = tl.load(variance + at, mask=j < c_k, other=0.0)
            loss = value * k_size * tl.sqrt(tl.minimum(var, 1.0)) / tl.where(var > 0, var, 1.0)
        loss = tl.where(valid & (chosen == 0), loss, 0.0)
        error += tl.sum(loss * loss, axis=0)
    tl.store(errors + row * c_q + i, error * size.to(tl.float32) / n)


def select_by_error(q_clusters, k_clusters, moments, density: float, scale: float, dropped: bool):
    """See `select_by_error` in `__init__.py`."""
    b, h, c_q, d = q_clusters.centroids.shape
    c_k, rows, n_queries = k_clusters.centroids.shape[2], b * h, q_clusters.order.shape[2]
    device = q_clusters.order.device
    worth = torch.empty(b, h, c_q, c_k, dtype=torch.float32, device=device)
    counters = torch.empty(rows, _TOP.value + 2 * _NEXT.value, dtype=torch.int64, device=device)
    ties = torch.empty(rows, c_q, dtype=torch.int64, device=device)
    selected = torch.empty(b, h, c_q, c_k, dtype=torch.bool, device=device)
    errors = torch.empty(b, h, c_q, dtype=torch.float32, device=device)
    budget = int(density * n_queries * k_clusters.order.shape[2])  # every token is in a cluster
    offsets, bits = (q_clusters.offsets, k_clusters.offsets), {"TOP": _TOP.value, "NEXT": _NEXT.value}
    worth_kernel[cdiv(c_q, 16), rows](
        q_clusters.centroids, k_clusters.centroids, *offsets, moments.log_mass, moments.variance, moments.spread, worth, counters, scale, c_q, c_k,
        D=d, BLOCK_I=16, BLOCK_J=32, BLOCK_D=16, DROPPED=dropped, **bits, num_warps=4, num_stages=2,
    )  # fmt: skip
    every = density >= 1
    if not every:
        for level in range(3):
            count_pairs_kernel[c_q, rows](worth, *offsets, counters, budget, c_q, c_k, BLOCK_J=1024, LEVEL=level, **bits, num_warps=4)
        ties_kernel[c_q, rows](worth, *offsets, counters, ties, budget, c_q, c_k, BLOCK_J=1024, **bits, num_warps=4)
    choose_kernel[c_q, rows](
        worth, *offsets, counters, ties, moments.variance, moments.values, selected.view(torch.int8), errors,
        budget, float(n_queries), c_q, c_k, D=d, BLOCK_I=max(512, triton.next_power_of_2(c_q)), BLOCK_J=512 if dropped else 1024, BLOCK_D=16, DROPPED=dropped, ALL=every,
        **bits, num_warps=4,
    )  # fmt: skip
    return selected, errors.sum(-1).sqrt()
