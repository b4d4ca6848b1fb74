"""Triton kernels of a call's report: two launches in place of two dozen."""

import torch
import triton
import triton.language as tl

from ..triton_common import cluster_sizes, kernel


@kernel
def exact_pairs_kernel(selected, q_offsets, k_offsets, pairs, c_q, c_k, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_I,), tl.int64)
    for first in range(0, c_q, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        queries = cluster_sizes(q_offsets, row, i, c_q)
        keys = tl.zeros((BLOCK_I,), tl.int32)
        for start in range(0, c_k, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            size = cluster_sizes(k_offsets, row, j, c_k)
            pointers = selected + (row * c_q + i)[:, None] * c_k + j[None, :]
            taken = tl.load(pointers, mask=(i < c_q)[:, None] & (j < c_k)[None, :], other=0) != 0
            keys += tl.sum(tl.where(taken, size[None, :], 0), axis=1)
        total += queries.to(tl.int64) * keys
    tl.store(pairs + row, tl.sum(total, axis=0).to(tl.float64))


@kernel
def summary_kernel(pairs, squares, expected_errors, summary, count, all_pairs, rows, HAS_EXPECTED: tl.constexpr, BLOCK: tl.constexpr):
    """summary: density, error, expected error."""
    i = tl.arange(0, BLOCK).to(tl.int64)
    inside = i < count
    density = tl.sum(tl.load(pairs + i, mask=inside, other=0.0), axis=0) / count / all_pairs
    error = tl.sum(tl.load(squares + 2 * i, mask=inside, other=0.0).to(tl.float64), axis=0)
    norm = tl.sum(tl.load(squares + 2 * i + 1, mask=inside, other=0.0).to(tl.float64), axis=0)
    tl.store(summary, density.to(tl.float32))
    tl.store(summary + 1, tl.sqrt((error / norm).to(tl.float32)))
    if HAS_EXPECTED:
        head_errors = tl.load(expected_errors + i, mask=inside, other=0.0).to(tl.float64)
        tl.store(summary + 2, tl.sqrt((rows * tl.sum(head_errors * head_errors, axis=0) / norm).to(tl.float32)))


def exact_pairs(q_clusters, k_clusters, selected):
    """See `exact_pairs` in `__init__.py`."""
    b, h, c_q, c_k = selected.shape
    pairs = torch.empty(b, h, dtype=torch.float64, device=selected.device)
    exact_pairs_kernel[(b * h,)](
        selected.view(torch.int8), q_clusters.offsets, k_clusters.offsets, pairs, c_q, c_k, BLOCK_I=16, BLOCK_J=512, num_warps=8
    )
    return pairs


def summary(pairs, squares, expected_errors, all_pairs, rows):
    """See `summary` in `__init__.py`."""
    found = torch.empty(3, dtype=torch.float32, device=pairs.device)
    count = pairs.numel()
    summary_kernel[(1,)](
        pairs, squares, pairs if expected_errors is None else expected_errors, found, count, float(all_pairs), float(rows),
        HAS_EXPECTED=expected_errors is not None, BLOCK=max(128, triton.next_power_of_2(count)), num_warps=1,
    )  # fmt: skip
    density, error, expected = found.unbind()
    return density, error, None if expected_errors is None else expected
