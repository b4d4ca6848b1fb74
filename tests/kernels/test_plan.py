"""The plan that every GPU kernel walks through: query tiles and granules of keys."""

import cases
import pytest
import torch

pytest.importorskip("triton", reason="the plan is made by Triton, which has no build for this system")

from svg2_pack.svg2_core.ops.near_field.plan import GRANULE, HIGH, LOW, plan, query_tiles


def offsets_of(g, rows, clusters, tokens, device):
    """Of ragged clusters: some empty, some of a tile's height or one row more."""
    cut = torch.rand(rows, clusters - 1, generator=g).mul(tokens).int().sort(-1).values
    cut[:, 3:5] = cut[:, 2:3]
    cut[:, 0] = cut[:, 1] - torch.tensor([64, 65, 128])[:rows]
    ends = torch.zeros(rows, 1), torch.full((rows, 1), tokens)
    return torch.cat([ends[0], cut.clamp(0, tokens), ends[1]], -1).sort(-1).values.int().to(device)


@pytest.mark.parametrize("seed", range(4))
def test_every_query_is_in_one_tile_and_the_longest_come_first(device, seed):
    rows, c, video = 3, 9, 1500
    g = cases.generator(seed)
    offsets = offsets_of(g, rows, c, video, device)
    counts = torch.randint(0, 30, (rows, c), generator=g, dtype=torch.int32).to(device)
    tiles, tile_counts, max_tiles = query_tiles(offsets[None], video, counts)
    for row in range(rows):
        seen = torch.zeros(video, dtype=torch.int32)
        for height, (entries, count, bound) in enumerate(zip(tiles[:, row], tile_counts[:, row].tolist(), max_tiles, strict=True)):
            assert count <= bound <= len(entries)
            last = float("inf")
            for entry in entries[:count].tolist():
                cluster, number = entry >> 16, entry & 65535
                begin, end = offsets[row, cluster].item() + number * HIGH, offsets[row, cluster + 1].item()
                left = end - begin
                assert left > LOW if height == 0 else 0 < left <= LOW
                seen[begin : min(begin + HIGH, end)] += 1
                assert counts[row, cluster].item() <= last
                last = counts[row, cluster].item()
        assert (seen == 1).all()


def test_granules_hold_the_keys_of_what_is_selected(device):
    g, c_q, c_k, video = cases.generator(7), 3, 9, 400
    k_offsets = offsets_of(g, 2, c_k, video, device)[None]
    order = torch.stack([torch.randperm(video, generator=g) for _ in range(2)])[None].int().to(device)
    selected = (torch.rand(1, 2, c_q, c_k, generator=g) < 0.4).to(device)
    selected[0, 1, 2] = False
    q = cases.clusters_of(torch.randint(c_q, (1, 2, video), generator=g).to(device), c_q)
    planned = plan(q, q._replace(order=order, offsets=k_offsets), selected)
    for row in range(2):
        members = order[0, row].split(k_offsets[0, row].diff().tolist())
        for cluster in range(c_q):
            granules = planned.granule_lists[row, cluster, : planned.granule_counts[row, cluster]].long()
            keys = planned.keys[row].view(-1, GRANULE)[granules]
            padding = keys < 0
            assert (padding[:, 1:] >= padding[:, :-1]).all() and not padding[:, 0].any(), "what a granule lacks is at its end"
            expected = [members[j] for j in selected[0, row, cluster].nonzero()[:, 0].tolist()]
            assert len(granules) == sum(-(-len(m) // GRANULE) for m in expected)
            assert torch.equal(keys[~padding], torch.cat([*expected, order.new_empty(0)]))
