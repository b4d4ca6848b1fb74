"""The work list of the GPU kernels of near and far field: a padded permutation of the keys, granules by query cluster, query tiles.

A granule is 16 keys of one cluster, its last one padded: kernels with any key block that is a multiple of 16 then take granules as
they are, with no search for where a cluster ends. All buffers are sized by shapes: no count is ever read on the host.
"""

from dataclasses import dataclass

import torch
import triton.language as tl

from ..triton_common import cdiv, cluster_sizes, kernel

GRANULE = 16
HIGH, LOW = 128, 64  # rows of the two sizes of query tile
_TILE = 1 << 16  # an entry of `tiles` is cluster * _TILE + index of the tile in the cluster


@kernel
def pad_kernel(order, offsets, keys, starts, n, c, padded_keys, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, GRANULE: tl.constexpr):
    """keys[row, padded index]: the tokens of one key cluster, aligned to a granule, -1 as padding of its last; starts[row, cluster]:
    its first granule, and past the last cluster's the count of all."""
    row, cluster = tl.program_id(1).to(tl.int64), tl.program_id(0)
    cs, t = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_T)
    start = 0
    for chunk in range(0, cluster + 1, BLOCK_C):
        size = tl.where(chunk + cs < cluster, cluster_sizes(offsets, row, chunk + cs, c), 0)
        start += tl.sum((size + GRANULE - 1) // GRANULE, axis=0)
    first = tl.load(offsets + row * (c + 1) + cluster)
    end = tl.load(offsets + row * (c + 1) + cluster + 1)
    granules = (end - first + GRANULE - 1) // GRANULE
    tl.store(starts + row * (c + 1) + cluster, start)
    if cluster == c - 1:
        tl.store(starts + row * (c + 1) + c, start + granules)
    for padded in range(0, granules * GRANULE, BLOCK_T):
        position = first + padded + t
        token = tl.load(order + row * n + position, mask=position < end, other=-1)
        tl.store(keys + row * padded_keys + start * GRANULE + padded + t, token, mask=padded + t < granules * GRANULE)


@kernel
def list_kernel(selected, starts, granule_lists, granule_counts, c_q, c_k, max_granules, BLOCK_C: tl.constexpr):
    """granule_lists[row, query cluster]: the granules of its selected key clusters, concatenated; granule_counts: their count."""
    row = tl.program_id(1).to(tl.int64)
    cluster_row = row * c_q + tl.program_id(0)
    total = 0
    for chunk in range(0, c_k, BLOCK_C):
        j = chunk + tl.arange(0, BLOCK_C)
        first_granule = tl.load(starts + row * (c_k + 1) + j, mask=j < c_k, other=0)
        size = tl.load(starts + row * (c_k + 1) + j + 1, mask=j < c_k, other=0) - first_granule
        size = tl.where(tl.load(selected + cluster_row * c_k + j, mask=j < c_k, other=0) != 0, size, 0)
        index = total + tl.cumsum(size, axis=0) - size
        for i in range(0, tl.max(size, axis=0)):
            tl.store(granule_lists + cluster_row * max_granules + index + i, first_granule + i, mask=i < size)
        total += tl.sum(size, axis=0)
    tl.store(granule_counts + cluster_row, total)


@kernel
def tiles_kernel(
    q_offsets, granule_counts, tiles, tile_counts, c, tile_stride, ROWS_HIGH: tl.constexpr, ROWS_LOW: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    """tiles[0][row]: the high tiles, with a cluster's remainder where it does not fit a low one; tiles[1][row]: the low ones. Sorted by
    descending granule count of their cluster, or in cluster order; tile_counts: how many of each."""
    row = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1)
    i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    cost = tl.where(i < c, 0, -1)
    if HAS_COUNTS:
        cost = tl.load(granule_counts + row * c + i, mask=i < c, other=-1)
    size = cluster_sizes(q_offsets, row, i, c)
    first_high = tl.zeros((BLOCK_C,), tl.int32)
    first_low = tl.zeros((BLOCK_C,), tl.int32)
    total_high = 0
    total_low = 0
    for chunk in range(0, c, BLOCK_J):
        j = chunk + tl.arange(0, BLOCK_J)
        other_cost = tl.where(j < c, 0, -1)
        if HAS_COUNTS:
            other_cost = tl.load(granule_counts + row * c + j, mask=j < c, other=-1)
        other_size = cluster_sizes(q_offsets, row, j, c)
        remainder = other_size % ROWS_HIGH
        high = other_size // ROWS_HIGH + (remainder > ROWS_LOW).to(tl.int32)
        low = ((remainder > 0) & (remainder <= ROWS_LOW)).to(tl.int32)
        earlier = (other_cost[None, :] > cost[:, None]) | ((other_cost[None, :] == cost[:, None]) & (j[None, :] < i[:, None]))
        first_high += tl.sum(tl.where(earlier, high[None, :], 0), axis=1)
        first_low += tl.sum(tl.where(earlier, low[None, :], 0), axis=1)
        total_high += tl.sum(high, axis=0)
        total_low += tl.sum(low, axis=0)
    remainder = size % ROWS_HIGH
    count = size // ROWS_HIGH + (remainder > ROWS_LOW).to(tl.int32)
    for t in range(0, tl.max(count, axis=0)):
        tl.store(tiles + row * tile_stride + first_high + t, i * TILE + t, mask=(t < count) & (i < c))
    fits_low = (remainder > 0) & (remainder <= ROWS_LOW) & (i < c)
    tl.store(tiles + (rows + row) * tile_stride + first_low, i * TILE + size // ROWS_HIGH, mask=fits_low)
    if tl.program_id(0) == 0:
        tl.store(tile_counts + row, total_high)
        tl.store(tile_counts + rows + row, total_low)


@dataclass(frozen=True)
class Plan:
    """All int32, on the device; rows are batch rows by heads.

    keys `[rows, padded_keys]`: video tokens in cluster order, each cluster aligned to a granule, -1 as padding.
    granule_lists `[rows, Cq, granules]`, granule_counts `[rows, Cq]`: indices of the granules that a query cluster attends to.
    tiles `[2, rows, tile_stride]`, tile_counts `[2, rows]`: query tiles of HIGH and of LOW rows, as cluster * 2^16 + index: a tile's
    rows begin at offset HIGH * index of its cluster. max_tiles: upper bounds of both counts, from shapes alone.
    """

    keys: torch.Tensor
    granule_lists: torch.Tensor
    granule_counts: torch.Tensor
    tiles: torch.Tensor
    tile_counts: torch.Tensor
    max_tiles: tuple[int, int]


def query_tiles(
    q_offsets: torch.Tensor, queries: int, granule_counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """tiles, tile_counts and max_tiles of a `Plan`, from offsets `[B, H, Cq + 1]` of clusters of `queries`; by descending
    granule_counts `[rows, Cq]`, or in cluster order."""
    rows, c = q_offsets.shape[0] * q_offsets.shape[1], q_offsets.shape[2] - 1
    max_tiles = (min(queries // (LOW + 1), queries // HIGH + c), c)  # a high tile has more than LOW rows
    tile_stride = max(*max_tiles, 1)
    tiles = torch.empty(2, rows, tile_stride, dtype=torch.int32, device=q_offsets.device)
    tile_counts = torch.empty(2, rows, dtype=torch.int32, device=q_offsets.device)
    tiles_kernel[cdiv(c, 32), rows](
        q_offsets, q_offsets if granule_counts is None else granule_counts, tiles, tile_counts, c, tile_stride,
        ROWS_HIGH=HIGH, ROWS_LOW=LOW, TILE=_TILE, BLOCK_C=32, BLOCK_J=128, HAS_COUNTS=granule_counts is not None, num_warps=4,
    )  # fmt: skip
    return tiles, tile_counts, max_tiles


def plan(q_clusters, k_clusters, selected: torch.Tensor) -> Plan:
    """The plan of a call, from its clusters and its block map bool `[B, H, Cq, Ck]`."""
    b, h, c_q, c_k = selected.shape
    rows, n = b * h, k_clusters.order.shape[2]
    granules = n // GRANULE + c_k  # upper bound for clusters of n keys

    def empty(*shape):
        return torch.empty(rows, *shape, dtype=torch.int32, device=selected.device)

    keys, starts = empty(granules * GRANULE), empty(c_k + 1)
    pad_kernel[c_k, rows](
        k_clusters.order, k_clusters.offsets, keys, starts, n, c_k, granules * GRANULE, BLOCK_C=256, BLOCK_T=64, GRANULE=GRANULE, num_warps=1
    )
    granule_lists, granule_counts = empty(c_q, granules), empty(c_q)
    list_kernel[c_q, rows](
        selected.view(torch.int8), starts, granule_lists, granule_counts, c_q, c_k, granules, BLOCK_C=1024, num_warps=4
    )
    return Plan(keys, granule_lists, granule_counts, *query_tiles(q_clusters.offsets, q_clusters.order.shape[2], granule_counts))
