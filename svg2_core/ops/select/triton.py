"""Triton kernels of the rule of mass: scores, then top-p per row by bisection on the mass threshold, without a sort."""

import torch
import triton
import triton.language as tl

from ..triton_common import cdiv, kernel, product_of_rows
from .triton_by_error import select_by_error  # noqa: F401  (the operation's other rule)


@kernel
def scores_kernel(
    q, k, k_sizes, scores, scale, c_q, c_k,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scores[row, i, j] = scale * q_i.k_j + log |K_j| in fp32; -inf for an empty key cluster."""
    row = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = product_of_rows(q, k, row, i, j, c_q, c_k, D, BLOCK_D, BLOCK_Q, BLOCK_K)
    size = tl.load(k_sizes + row * c_k + j, mask=j < c_k, other=0)
    weight = tl.where(size > 0, tl.log(tl.maximum(size, 1).to(tl.float32)), float("-inf"))
    tl.store(
        scores + (row * c_q + i)[:, None] * c_k + j[None, :], acc * scale + weight[None, :],
        mask=(i < c_q)[:, None] & (j < c_k)[None, :],
    )  # fmt: skip


@kernel
def select_kernel(scores, selected, top_p, least, c_q, c_k, BLOCK_K: tl.constexpr):
    """selected[row, i, j]: the heaviest key clusters of query cluster i whose mass reaches top_p, at least `least`.

    A cluster's distance below the best score, a float of at least 0, orders like its own bits: 31 halvings find the least
    distance within which both conditions hold exactly.
    """
    at = (tl.program_id(1).to(tl.int64) * c_q + tl.program_id(0)) * c_k
    j = tl.arange(0, BLOCK_K)
    score = tl.load(scores + at + j, mask=j < c_k, other=float("-inf"))
    filled = score > float("-inf")
    below = tl.where(filled, tl.max(score, axis=0) - score, float("inf"))
    mass = tl.exp(-below)
    bits = below.to(tl.int32, bitcast=True)
    target_mass = top_p * tl.sum(mass, axis=0)
    least_count = tl.minimum(least, tl.sum(filled.to(tl.int32), axis=0))
    low = -1  # a distance within which the conditions do not hold; `high` is one within which they do
    high = 0x7F7FFFFF  # the bits of the greatest finite float
    for _ in range(31):
        middle = low + (high - low) // 2
        within = bits <= middle
        enough = (tl.sum(tl.where(within, mass, 0.0), axis=0) >= target_mass) & (tl.sum(within.to(tl.int32), axis=0) >= least_count)
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    # Of the clusters at that very distance, the lower ones, and as many as it takes.
    nearer = bits < high
    tied = bits == high
    ties_before = tl.cumsum(tied.to(tl.int32), axis=0) - 1
    mass_before = tl.sum(tl.where(nearer, mass, 0.0), axis=0) + ties_before.to(tl.float32) * mass
    needed = (mass_before < target_mass) | (tl.sum(nearer.to(tl.int32), axis=0) + ties_before < least_count)
    tl.store(selected + at + j, (nearer | (tied & needed)).to(tl.int8), mask=j < c_k)


def select_by_mass(q_centroids, k_centroids, k_sizes, top_p: float, least: int, scale: float) -> torch.Tensor:
    """See `select_by_mass` in `__init__.py`; bool `[B, H, Cq, Ck]`."""
    b, h, c_q, d = q_centroids.shape
    c_k = k_centroids.shape[2]
    if top_p >= 1:
        return (k_sizes > 0)[:, :, None, :].expand(b, h, c_q, c_k).contiguous()
    scores = torch.empty(b, h, c_q, c_k, dtype=torch.float32, device=q_centroids.device)
    selected = torch.empty(b, h, c_q, c_k, dtype=torch.bool, device=q_centroids.device)
    scores_kernel[cdiv(c_q, 32), cdiv(c_k, 32), b * h](
        q_centroids.contiguous(), k_centroids.contiguous(), k_sizes.contiguous(), scores, scale, c_q, c_k,
        D=d, BLOCK_Q=32, BLOCK_K=32, BLOCK_D=16, num_warps=4, num_stages=2,
    )  # fmt: skip
    select_kernel[c_q, b * h](
        scores, selected.view(torch.int8), top_p, least, c_q, c_k, BLOCK_K=max(16, triton.next_power_of_2(c_k)), num_warps=4
    )
    return selected
