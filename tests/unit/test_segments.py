"""Sums by segments, and segments in tiles, against loops."""

import pytest
import torch
from svg2_pack.svg2_core.ops.segments import segment_max, segment_mean, segment_sum, tiles_of_segments

SIZES = ([3, 0, 5, 1, 0], [0, 0], [700, 1, 0, 300], [256, 257], [10_000])


def made(sizes):
    g = torch.Generator().manual_seed(0)
    n = sum(sizes)
    return torch.randn(n, 6, generator=g) + 10, torch.tensor([0, *sizes]).cumsum(0).int(), torch.randperm(n, generator=g)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_and_means(sizes):
    x, offsets, order = made(sizes)
    parts = x[order].double().split(sizes)
    expected = torch.stack([part.sum(0) for part in parts])
    assert (segment_sum(x, offsets, order) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(segment_sum(x[order], offsets), segment_sum(x, offsets, order))
    means = torch.stack([part.mean(0) if len(part) else part.sum(0) for part in parts])
    assert (segment_mean(x, offsets, order) - means).abs().max() <= 1e-6 * 15


@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
def test_maxima(sizes):
    x, offsets, _ = made(sizes)
    expected = [part.amax(0) if len(part) else torch.zeros(6) for part in x.split(sizes)]
    assert torch.equal(segment_max(x, offsets), torch.stack(expected))


@pytest.mark.parametrize("most", [1, 4, 300, 20_000])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tiles_hold_whole_segments_in_turn(sizes, most):
    offsets = made(sizes)[1].tolist()
    tiles = tiles_of_segments(torch.tensor(offsets), most)
    assert [c for _, clusters in tiles for c in range(clusters.start, clusters.stop)] == list(range(len(sizes)))
    for rows, clusters in tiles:
        assert (rows.start, rows.stop) == (offsets[clusters.start], offsets[clusters.stop])
        assert rows.stop - rows.start <= most or clusters.stop - clusters.start == 1
