"""k-means as Triton kernels. One round is: assign, count, scan, scatter, update.

Nothing is added up by floating-point atomics and no order depends on timing, so results repeat bit for bit. Tokens are
put in cluster order by a counting sort whose counters are integers.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import INTERPRETED, dot

# Tokens per chunk of the counting sort: the scatter compares all pairs within a chunk, the counters grow with 1 / chunk.
_CHUNK = 256
# Tile sizes, the same on every architecture until they are tuned.
_ASSIGN = {"BLOCK_N": 128, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3}
_MEANS = {"BLOCK_T": 32, "num_warps": 4, "num_stages": 3}


@triton.jit
def assign_kernel(
    x, away, biases, labels, n, c, h,
    x_b, x_h, x_n, x_d,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """labels[row, token] = the centroid with the least bias - 2 x.away (see `reference.py`); ties go to the lower one."""
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    x += row // h * x_b + row % h * x_h
    xs = tl.load(
        x + tokens.to(tl.int64)[:, None] * x_n + dims.to(tl.int64)[None, :] * x_d,
        mask=(tokens < n)[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    label = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, c, BLOCK_C):
        cs = first + tl.arange(0, BLOCK_C)
        ct = tl.load(
            away + (row * c + cs)[None, :] * D + dims[:, None],
            mask=(cs < c)[None, :] & (dims < D)[:, None], other=0.0,
        )  # fmt: skip
        bias = tl.load(biases + row * c + cs, mask=cs < c, other=float("inf"))
        distance = bias[None, :] - 2 * dot(xs, ct, UPCAST)
        nearest = tl.min(distance, axis=1)
        index = tl.argmin(distance, axis=1) + first
        label = tl.where(nearest < best, index, label)
        best = tl.minimum(nearest, best)
    # NaN among the inputs confuses argmin; it must not become an index out of bounds.
    tl.store(labels + row * n + tokens, tl.minimum(label, c - 1), mask=tokens < n)


@triton.jit
def count_kernel(labels, counts, n, c, chunks, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """counts[row, chunk, cluster] = tokens of the chunk in the cluster. BINS > c: the last bin takes what is no token."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    label = tl.load(labels + row * n + tokens, mask=tokens < n, other=BINS - 1)
    bins = tl.arange(0, BINS)
    tl.store(counts + (row * chunks + chunk) * c + bins, tl.histogram(label, BINS), mask=bins < c)


@triton.jit
def scan_kernel(counts, sizes, c, chunks, BLOCK_C: tl.constexpr):
    """counts[row, chunk, cluster] becomes the cluster's tokens in earlier chunks; sizes[row, cluster] all of them."""
    row = tl.program_id(1).to(tl.int64)
    cs = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.int32)
    for chunk in range(0, chunks):
        place = counts + (row * chunks + chunk) * c + cs
        here = tl.load(place, mask=cs < c, other=0)
        tl.store(place, total, mask=cs < c)
        total += here
    tl.store(sizes + row * c + cs, total, mask=cs < c)


@triton.jit
def scatter_kernel(labels, counts, offsets, order, n, c, chunks, CHUNK: tl.constexpr, BLOCK_J: tl.constexpr):
    """order[row, place] = token, ascending within a cluster."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    i = tl.arange(0, CHUNK)
    tokens = chunk * CHUNK + i
    label = tl.load(labels + row * n + tokens, mask=tokens < n, other=-1)
    rank = tl.zeros((CHUNK,), tl.int32)  # tokens of the same cluster earlier in this chunk
    for first in range(0, CHUNK, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = tl.load(labels + row * n + chunk * CHUNK + j, mask=chunk * CHUNK + j < n, other=-2)
        same = (label[:, None] == other[None, :]) & (j[None, :] < i[:, None])
        rank += tl.sum(same.to(tl.int32), axis=1)
    inside = tokens < n
    place = tl.load(offsets + row * (c + 1) + label, mask=inside, other=0)
    place += tl.load(counts + (row * chunks + chunk) * c + label, mask=inside, other=0)
    tl.store(order + row * n + place + rank, tokens, mask=inside)


@triton.jit
def means_kernel(
    x, order, offsets, means, middles, away, biases, n, c, h, limit,
    x_b, x_h, x_n, x_d,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, FOR_ASSIGNMENT: tl.constexpr,
):  # fmt: skip
    """means[row, cluster] = mean of its tokens; an empty cluster keeps what stands there.

    Summed in fp32, with the rounding of each step carried on: in a huge cluster they would all go the same way.

    FOR_ASSIGNMENT: also write away and biases, the means as the next assignment needs them.
    """
    row, cluster = tl.program_id(1).to(tl.int64), tl.program_id(0)
    x += row // h * x_b + row % h * x_h
    dims = tl.arange(0, BLOCK_D)
    first = tl.load(offsets + row * (c + 1) + cluster)
    end = tl.load(offsets + row * (c + 1) + cluster + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    lost = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, end, BLOCK_T):
        place = start + tl.arange(0, BLOCK_T)
        token = tl.load(order + row * n + place, mask=place < end, other=0).to(tl.int64)
        rows = tl.load(
            x + token[:, None] * x_n + dims.to(tl.int64)[None, :] * x_d,
            mask=(place < end)[:, None] & (dims < D)[None, :], other=0.0,
        )  # fmt: skip
        more = tl.sum(rows.to(tl.float32), axis=0) - lost
        larger = total + more
        lost = (larger - total) - more
        total = larger
    at = (row * c + cluster) * D + dims
    old = tl.load(means + at, mask=dims < D, other=0.0)
    mean = tl.where(end > first, total / tl.maximum(end - first, 1).to(tl.float32), old)
    tl.store(means + at, mean, mask=dims < D)
    if FOR_ASSIGNMENT:
        middle = tl.load(middles + row * D + dims, mask=dims < D, other=0.0)
        _store_away(mean, middle, away + at, biases + row * c + cluster, dims < D, limit)


@triton.jit
def away_kernel(means, middles, away, biases, c, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """away and biases of centroids that are given."""
    row, cluster = tl.program_id(1).to(tl.int64), tl.program_id(0)
    dims = tl.arange(0, BLOCK_D)
    at = (row * c + cluster) * D + dims
    mean = tl.load(means + at, mask=dims < D, other=0.0)
    middle = tl.load(middles + row * D + dims, mask=dims < D, other=0.0)
    _store_away(mean, middle, away + at, biases + row * c + cluster, dims < D, limit)


@triton.jit
def _store_away(mean, middle, away, bias, real, limit):
    """A centroid as seen from the middle, in the inputs' precision, and what its rounded self adds to the distance."""
    low = tl.minimum(tl.maximum(mean - middle, -limit), limit).to(away.dtype.element_ty)
    tl.store(away, low, mask=real)
    e = tl.where(real, low.to(tl.float32), 0.0)
    tl.store(bias, tl.sum(e * (e + 2 * middle), axis=0))


def lloyd(x: torch.Tensor, init: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kmeans`; order, offsets and centroids as in `Clusters`."""
    b, h, n, d = x.shape
    c, rows, chunks = init.shape[2], b * h, triton.cdiv(n, _CHUNK)
    block_d = max(16, triton.next_power_of_2(d))
    means = init.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    middles = means.mean(2)
    away = torch.empty(b, h, c, d, dtype=x.dtype, device=x.device)
    biases = torch.empty(rows, c, dtype=torch.float32, device=x.device)
    limit = torch.finfo(x.dtype).max
    away_kernel[c, rows](means, middles, away, biases, c, limit, D=d, BLOCK_D=block_d, num_warps=1)
    labels = torch.empty(rows, n, dtype=torch.int32, device=x.device)
    counts = torch.empty(rows, chunks, c, dtype=torch.int32, device=x.device)
    sizes = torch.empty(rows, c, dtype=torch.int32, device=x.device)
    order = torch.empty(b, h, n, dtype=torch.int32, device=x.device)
    offsets = torch.zeros(b, h, c + 1, dtype=torch.int32, device=x.device)
    for _ in range(iterations):
        assign_kernel[triton.cdiv(n, _ASSIGN["BLOCK_N"]), rows](
            x, away, biases, labels, n, c, h, *x.stride(), D=d, BLOCK_D=block_d, UPCAST=INTERPRETED, **_ASSIGN
        )
        count_kernel[chunks, rows](labels, counts, n, c, chunks, CHUNK=_CHUNK, BINS=triton.next_power_of_2(c + 1))
        scan_kernel[triton.cdiv(c, 128), rows](counts, sizes, c, chunks, BLOCK_C=128)
        torch.cumsum(sizes.view(b, h, c), -1, dtype=torch.int32, out=offsets[..., 1:])
        scatter_kernel[chunks, rows](labels, counts, offsets, order, n, c, chunks, CHUNK=_CHUNK, BLOCK_J=16)
        means_kernel[c, rows](
            x, order, offsets, means, middles, away, biases, n, c, h, limit, *x.stride(),
            D=d, BLOCK_D=block_d, FOR_ASSIGNMENT=True, **_MEANS,
        )  # fmt: skip
    return order, offsets, means


def cluster_means(values: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """See `cluster_means` in `__init__.py`."""
    b, h, n, d = values.shape
    c = offsets.shape[-1] - 1
    means = torch.zeros(b, h, c, d, dtype=torch.float32, device=values.device)
    means_kernel[c, b * h](
        values, order, offsets, means, means, means, means, n, c, h, 0.0, *values.stride(),
        D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), FOR_ASSIGNMENT=False, **_MEANS,
    )  # fmt: skip
    return means
