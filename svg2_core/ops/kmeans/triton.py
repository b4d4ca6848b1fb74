"""Triton kernels of k-means: an iteration is assign and count, scan, scatter, update.

Nothing is added up by floating-point atomics and no order depends on timing, so results repeat bit for bit. Tokens are
put in cluster order by a counting sort whose counters are integers.

In a logit space (metric.py) tokens are projected in the assignment kernel, and never stored: the mean of a cluster's points
is the projection of its tokens' mean.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import INTERPRETED, block_of, cdiv, dot, finite, kernel, products_dtype
from .cold_start_triton import hashed_token
from .metric_triton import logit_spaces  # noqa: F401  (the operation's third function)

# Tokens per chunk of the counting sort, which is the tile that is assigned by one program: the scatter compares all pairs within a
# chunk, the counters grow with 1 / chunk.
CHUNK = 256
# Tile sizes, the same on every architecture until they are tuned.
_ASSIGN = {"BLOCK_C": 64, "num_warps": 8, "num_stages": 3}
_MEANS = {"BLOCK_T": 32, "num_warps": 4, "num_stages": 3}
_COUNTERS = 8192  # at a time, of a scan


@triton.jit
def _projection(projection, largest, row, dims, cs, D: tl.constexpr, W: tl.constexpr, dtype):
    """A row's projection divided by its largest entry, in `dtype`, so that none leaves the range of 16 bits."""
    p = tl.load(
        projection + (row * D + dims)[:, None] * W + cs[None, :], mask=(dims < D)[:, None] & (cs < W)[None, :], other=0.0
    )
    return (p / tl.load(largest + row)).to(dtype)


@kernel
def assign_kernel(
    x, projection, largest, projected_mean, centred, biases, labels, counts, n, c, h, chunks,
    x_b, x_h, x_n, x_d,
    D: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    BINS: tl.constexpr, IN_SPACE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """labels[row, token] = the centroid with the least bias - 2 x.centred (see `reference.py`); ties go to the lower one.
    counts[row, chunk, cluster] = tokens of the chunk in the cluster. BINS > c: the last bin takes what is no token."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    dims = tl.arange(0, BLOCK_D)
    axes = tl.arange(0, BLOCK_W)
    x += row // h * x_b + row % h * x_h
    xs = tl.load(
        x + tokens.to(tl.int64)[:, None] * x_n + dims.to(tl.int64)[None, :] * x_d,
        mask=(tokens < n)[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    if IN_SPACE:
        p = _projection(projection, largest, row, dims, axes, D, W, xs.dtype)
        points = dot(finite(xs.to(tl.float32)).to(xs.dtype), p, UPCAST) * tl.load(largest + row)
        points -= tl.load(projected_mean + row * W + axes, mask=axes < W, other=0.0)[None, :]
        points = points.to(centred.dtype.element_ty)
    else:
        points = xs
    best = tl.full((CHUNK,), float("inf"), tl.float32)
    label = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, c, BLOCK_C):
        cs = first + tl.arange(0, BLOCK_C)
        ct = tl.load(
            centred + (row * c + cs)[None, :] * W + axes[:, None], mask=(cs < c)[None, :] & (axes < W)[:, None], other=0.0
        )
        bias = tl.load(biases + row * c + cs, mask=cs < c, other=float("inf"))
        distance = bias[None, :] - 2 * dot(points, ct, UPCAST)
        nearest = tl.min(distance, axis=1)
        index = tl.argmin(distance, axis=1) + first
        label = tl.where(nearest < best, index, label)
        best = tl.minimum(nearest, best)
    # NaN among the inputs confuses argmin; it must not become an index out of bounds.
    label = tl.minimum(label, c - 1)
    tl.store(labels + row * n + tokens, label, mask=tokens < n)
    label = tl.where(tokens < n, label, BINS - 1)
    bins = tl.arange(0, BINS)
    tl.store(counts + (row * chunks + chunk) * c + bins, tl.histogram(label, BINS), mask=bins < c)


@kernel
def scan_kernel(counts, offsets, c, chunks, BLOCK_T: tl.constexpr, BINS: tl.constexpr):
    """counts[row, chunk, cluster] becomes the cluster's tokens in earlier chunks; offsets[row] of all clusters."""
    row = tl.program_id(0).to(tl.int64)
    cs, t = tl.arange(0, BINS), tl.arange(0, BLOCK_T)
    total = tl.zeros((BINS,), tl.int32)
    for first in range(0, chunks, BLOCK_T):
        index = counts + (row * chunks + first + t)[:, None] * c + cs[None, :]
        inside = (first + t < chunks)[:, None] & (cs < c)[None, :]
        held = tl.load(index, mask=inside, other=0)
        tl.store(index, tl.cumsum(held, axis=0) - held + total[None, :], mask=inside)
        total += tl.sum(held, axis=0)
    tl.store(offsets + row * (c + 1) + 1 + cs, tl.cumsum(total, axis=0), mask=cs < c)
    tl.store(offsets + row * (c + 1), 0)


@kernel
def scatter_kernel(labels, counts, offsets, order, n, c, chunks, CHUNK: tl.constexpr, BLOCK_J: tl.constexpr):
    """order[row, position] = token, ascending within a cluster."""
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
    position = tl.load(offsets + row * (c + 1) + label, mask=inside, other=0)
    position += tl.load(counts + (row * chunks + chunk) * c + label, mask=inside, other=0)
    tl.store(order + row * n + position + rank, tokens, mask=inside)


@kernel
def means_kernel(
    x, order, offsets, means, projection, largest, projected_mean, points, origins, centred, biases, n, c, h, limit,
    x_b, x_h, x_n, x_d,
    D: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    IN_SPACE: tl.constexpr, FOR_ASSIGNMENT: tl.constexpr,
):  # fmt: skip
    """means[row, cluster] = mean of its tokens; an empty cluster keeps its old one.

    Summed in fp32 with Kahan's compensation: in a huge cluster all roundings would go the same way.

    FOR_ASSIGNMENT: also write centred and biases, the centroids as the next assignment needs them.
    IN_SPACE: also points, the means' projections. A token that is not finite then counts as zero, and the mean of an empty
    cluster is zero; it keeps its point.
    """
    row, cluster = tl.program_id(1).to(tl.int64), tl.program_id(0)
    x += row // h * x_b + row % h * x_h
    dims = tl.arange(0, BLOCK_D)
    axes = tl.arange(0, BLOCK_W)
    first = tl.load(offsets + row * (c + 1) + cluster)
    end = tl.load(offsets + row * (c + 1) + cluster + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    compensation = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, end, BLOCK_T):
        position = start + tl.arange(0, BLOCK_T)
        token = tl.load(order + row * n + position, mask=position < end, other=0).to(tl.int64)
        rows = tl.load(
            x + token[:, None] * x_n + dims.to(tl.int64)[None, :] * x_d,
            mask=(position < end)[:, None] & (dims < D)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if IN_SPACE:
            rows = finite(rows)
        compensated = tl.sum(rows, axis=0) - compensation
        new_total = total + compensated
        compensation = (new_total - total) - compensated
        total = new_total
    mean_index = (row * c + cluster) * D + dims
    mean = total / tl.maximum(end - first, 1).to(tl.float32)
    if not IN_SPACE:
        mean = tl.where(end > first, mean, tl.load(means + mean_index, mask=dims < D, other=0.0))
    tl.store(means + mean_index, mean, mask=dims < D)
    if IN_SPACE:
        p = _projection(projection, largest, row, dims, axes, D, W, x.dtype.element_ty).to(tl.float32)
        point = tl.sum(mean[:, None] * p, axis=0) * tl.load(largest + row)
        point -= tl.load(projected_mean + row * W + axes, mask=axes < W, other=0.0)
        point_index = (row * c + cluster) * W + axes
        point = tl.where(end > first, point, tl.load(points + point_index, mask=axes < W, other=0.0))
        tl.store(points + point_index, point, mask=axes < W)
        _store_centred(point, tl.zeros((BLOCK_W,), tl.float32), centred + point_index, biases + row * c + cluster, axes < W, limit)
    elif FOR_ASSIGNMENT:
        origin = tl.load(origins + row * D + dims, mask=dims < D, other=0.0)
        _store_centred(mean, origin, centred + mean_index, biases + row * c + cluster, dims < D, limit)


@kernel
def centre_kernel(means, origins, centred, biases, c, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """centred and biases of given centroids."""
    row, cluster = tl.program_id(1).to(tl.int64), tl.program_id(0)
    dims = tl.arange(0, BLOCK_D)
    index = (row * c + cluster) * D + dims
    mean = tl.load(means + index, mask=dims < D, other=0.0)
    origin = tl.load(origins + row * D + dims, mask=dims < D, other=0.0)
    _store_centred(mean, origin, centred + index, biases + row * c + cluster, dims < D, limit)


@kernel
def init_kernel(
    x, past, transfer, projection, largest, projected_mean, points, centred, biases, n, c, h, limit, seed, role, first_head,
    x_b, x_h, x_n, x_d,
    D: tl.constexpr, W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, COLD: tl.constexpr,
):  # fmt: skip
    """Initial points of clusters in a space: the seed tokens' (COLD), or the past's centroids transferred into it."""
    row, cluster = tl.program_id(1).to(tl.int64), tl.program_id(0)
    axes = tl.arange(0, BLOCK_W)
    index = (row * c + cluster) * W
    if COLD:
        dims = tl.arange(0, BLOCK_D)
        token = hashed_token(cluster.to(tl.int64), n, c, seed, role, first_head + row % h)
        x += row // h * x_b + row % h * x_h + token * x_n
        token_row = finite(tl.load(x + dims.to(tl.int64) * x_d, mask=dims < D, other=0.0).to(tl.float32))
        p = _projection(projection, largest, row, dims, axes, D, W, x.dtype.element_ty).to(tl.float32)
        point = tl.sum(token_row[:, None] * p, axis=0) * tl.load(largest + row)
        point -= tl.load(projected_mean + row * W + axes, mask=axes < W, other=0.0)
    else:
        old = tl.arange(0, BLOCK_W)
        centroid = tl.load(past + index + old, mask=old < W, other=0.0).to(tl.float32)
        matrix = tl.load(
            transfer + (row * W + old)[:, None] * W + axes[None, :], mask=(old < W)[:, None] & (axes < W)[None, :], other=0.0
        )
        point = tl.sum(centroid[:, None] * matrix, axis=0)
    point = finite(point)
    tl.store(points + index + axes, point, mask=axes < W)
    _store_centred(point, tl.zeros((BLOCK_W,), tl.float32), centred + index + axes, biases + row * c + cluster, axes < W, limit)


@triton.jit
def _store_centred(mean, origin, centred, bias, dim_mask, limit):
    """A centroid relative to the origin, in the inputs' precision, and what this rounded value adds to the distance."""
    rounded = tl.minimum(tl.maximum(mean - origin, -limit), limit).to(centred.dtype.element_ty)
    tl.store(centred, rounded, mask=dim_mask)
    exact = tl.where(dim_mask, rounded.to(tl.float32), 0.0)
    tl.store(bias, tl.sum(exact * (exact + 2 * origin), axis=0))


class _Lloyd:
    """The workspace of one run, and the launches of an iteration."""

    def __init__(self, x, c: int, space=None):
        b, h, n, d = x.shape
        self.x, self.c, self.rows, self.chunks = x, c, b * h, cdiv(n, CHUNK)
        self.space, w = space, d if space is None else space.projection.shape[3]
        dtype = x.dtype if space is None else products_dtype(x.dtype)
        self.shape = {"D": d, "BLOCK_D": block_of(d), "W": w, "BLOCK_W": block_of(w)}

        def empty(*shape, dtype=torch.int32):
            return torch.empty(*shape, dtype=dtype, device=x.device)

        self.centred, self.biases = empty(b, h, c, w, dtype=dtype), empty(b, h, c, dtype=torch.float32)
        self.limit = torch.finfo(dtype).max
        self.labels, self.counts = empty(self.rows, n), empty(self.rows, self.chunks, c)
        self.order, self.offsets = empty(b, h, n), empty(b, h, c + 1)
        # Any pointers where the kernel reads none of these.
        self.space_tensors = (self.centred,) * 3 if space is None else (space.projection, space.largest, space.projected_mean)

    def iterate(self, means, points, origins) -> None:
        x, c, (_, h, n, _) = self.x, self.c, self.x.shape
        strides, in_space = x.stride(), self.space is not None
        bins = max(512, triton.next_power_of_2(c + 1))  # at least 512: one variant serves most videos
        assign_kernel[self.chunks, self.rows](
            x, *self.space_tensors, self.centred, self.biases, self.labels, self.counts, n, c, h, self.chunks, *strides,
            **self.shape, CHUNK=CHUNK, BINS=bins, IN_SPACE=in_space, UPCAST=INTERPRETED, **_ASSIGN,
        )  # fmt: skip
        scan_kernel[(self.rows,)](self.counts, self.offsets, c, self.chunks, BLOCK_T=max(1, _COUNTERS // bins), BINS=bins, num_warps=8)
        scatter_kernel[self.chunks, self.rows](
            self.labels, self.counts, self.offsets, self.order, n, c, self.chunks, CHUNK=CHUNK, BLOCK_J=16
        )
        means_kernel[c, self.rows](
            x, self.order, self.offsets, means, *self.space_tensors, points, origins, self.centred, self.biases, n, c, h, self.limit, *strides,
            **self.shape, IN_SPACE=in_space, FOR_ASSIGNMENT=True, **_MEANS,
        )  # fmt: skip


def lloyd(x: torch.Tensor, init: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kmeans`; order, offsets and centroids as in `Clusters`."""
    run = _Lloyd(x, init.shape[2])
    means = init.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    origins = means.mean(2)
    centre_kernel[run.c, run.rows](
        means, origins, run.centred, run.biases, run.c, run.limit, D=x.shape[3], BLOCK_D=block_of(x.shape[3]), num_warps=1
    )
    for _ in range(iterations):
        run.iterate(means, means, origins)
    return run.order, run.offsets, means


def lloyd_in(x, space, c: int, init, iterations: int, seed: int, role: int, first_head: int):
    """See `kmeans_in`: order, offsets, means, points."""
    b, h, n, d = x.shape
    w = space.projection.shape[3]
    run = _Lloyd(x, c, space)
    means, points = (torch.empty(b, h, c, size, dtype=torch.float32, device=x.device) for size in (d, w))
    cold = init is None
    past, transfer = (points, points) if cold else (init.contiguous(), space.transfer)
    init_kernel[c, run.rows](
        x, past, transfer, *run.space_tensors, points, run.centred, run.biases, n, c, h, run.limit, seed, role, first_head,
        *x.stride(), **run.shape, COLD=cold, num_warps=1 if not cold else 4,
    )  # fmt: skip
    for _ in range(iterations):
        run.iterate(means, points, means)
    return run.order, run.offsets, means, points


def cluster_means(values: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """See `cluster_means` in `__init__.py`."""
    b, h, n, d = values.shape
    c = offsets.shape[-1] - 1
    means = torch.zeros(b, h, c, d, dtype=torch.float32, device=values.device)
    means_kernel[c, b * h](
        values, order, offsets, means, *(means,) * 7, n, c, h, 0.0, *values.stride(),
        D=d, W=d, BLOCK_D=block_of(d), BLOCK_W=block_of(d), IN_SPACE=False, FOR_ASSIGNMENT=False, **_MEANS,
    )  # fmt: skip
    return means
