"""What the kernels for Hopper have of their own: the list of query tiles, rows long enough to go round the ring of buffers
several times, tensors past 2^31 elements. What they share with all backends is in test_dynamic_attention.py."""

import cases
import pytest
import test_dynamic_attention
import torch
from svg2_pack.svg2_core.layout import Layout
from svg2_pack.svg2_core.ops.dynamic_attention import Tail, dynamic_attention
from svg2_pack.svg2_core.ops.dynamic_attention.tiles import longest_first
from test_dynamic_attention import C_K, C_Q, Case
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("seed", range(4))
def test_every_query_is_in_one_tile_and_the_longest_come_first(seed):
    g = cases.generator(seed)
    rows, c_q, video, high, low = 3, 9, 1500, 128, 64
    cut = torch.rand(rows, c_q - 1, generator=g).mul(video).int().sort(-1).values
    if seed:
        cut[:, 3:5] = cut[:, 2:3]  # empty clusters
        cut[:, 0] = cut[:, 1] - torch.tensor([64, 65, 128])
    ends = torch.zeros(rows, 1), torch.full((rows, 1), video)
    offsets = torch.cat([ends[0], cut.clamp(0, video), ends[1]], -1).sort(-1).values.int()
    cost = torch.randint(0, 30, (rows, c_q), generator=g, dtype=torch.int32)
    items = longest_first(offsets, cost, video, high, low)
    assert items.dtype == torch.int32 and items.shape == (rows * (video // high + c_q), 4)
    used = items[:, 3] > 0
    count = int(used.sum())
    assert not items[count:].any(), "what is left over is zeros, at the end"
    seen = torch.zeros(rows, video, dtype=torch.int32)
    last = (0, float("inf"))
    for row, cluster, begin, height in items[:count].tolist():
        first, end = offsets[row, cluster].item(), offsets[row, cluster + 1].item()
        whole = (begin - first) % high == 0 and first <= begin and begin + height <= end
        assert whole and height == min(high, end - begin), "tiles begin at multiples and leave nothing behind"
        seen[row, begin : begin + height] += 1
        place = (row, cost[row, cluster].item() * (2 if height > low else 1))
        assert place[0] > last[0] or (place[0] == last[0] and place[1] <= last[1])
        last = place
    assert (seen == 1).all()


def test_the_list_is_made_without_waiting_for_the_device():
    """A fake tensor has no values: whoever asks for one raises."""
    with FakeTensorMode():
        items = longest_first(torch.empty(40, 301, dtype=torch.int32), torch.empty(40, 300, dtype=torch.int32), 75_600, 128, 64)
        assert items.shape == (40 * (75_600 // 128 + 300), 4)


class LongCase(Case):
    """One head of few, large key clusters: query clusters of these sizes, tiles of keys by the dozen."""

    def __init__(self, seed, device, dtype, sizes, d, text=(0, 0), tail=False, bias=False):
        video = sum(sizes)
        super().__init__(seed, device, dtype, b=1, h=1, video=video, d=d, text=text, tail=tail, bias=bias)
        g = cases.generator(seed)
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self.q_labels = labels[torch.randperm(video, generator=g)].expand(1, 1, -1).to(device)
        share = torch.linspace(0.15, 1.0, self.selected.shape[2])[:, None]
        self.selected = (torch.rand(self.selected.shape, generator=g) < share).to(device)
        present = self.k_labels[0, 0].mode().values
        self.selected[..., present] = True


@pytest.mark.parametrize("backend", ["cuda_fa3"], indirect=True)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("text, tail, bias", [((0, 0), False, False), ((70, 190), True, True)], ids=["video", "text_tail"])
def test_many_tiles_of_keys(backend, device, d, text, tail, bias):
    """Of 1 to 128 query rows, over the ring of buffers and from one tile of queries to the next."""
    case = LongCase(21, device, torch.float16, (1, 64, 65, 128, 129, 200, 333), d, text=text, tail=tail, bias=bias)
    sizes = torch.bincount(case.k_labels[0, 0], minlength=case.selected.shape[-1])
    tiles = -(-(case.selected[0, 0].int() @ sizes.int().to(device)) // 128)
    assert tiles.max() >= 7 and {t % 2 for t in tiles.tolist()} == {0, 1}, "odd and even numbers of tiles"
    case.check(case.run(backend))


@pytest.mark.parametrize("backend", ["cuda_fa3"], indirect=True)
@pytest.mark.parametrize("rows", [40, 100])
def test_queries_without_any_key_of_the_video(backend, device, rows):
    """Nothing selected, no text: only the virtual keys are left, fewer than a tile has."""
    case = Case(22, device, torch.bfloat16, b=1, h=1, video=rows, d=64, tail=True)
    case.selected[:] = False
    case.check(case.run(backend))


@pytest.mark.parametrize("backend", ["cuda_fa3"], indirect=True)
@pytest.mark.parametrize("least, most", [(-30, 30), (-700, -600)])
def test_large_text_biases(backend, device, least, most):
    """A tile that is masked altogether comes first, in both heights of tiles; and no logit is anywhere near 0."""
    case = Case(23, device, torch.float16, b=1, h=1, video=173, text=(150, 140))
    case.selected[:] = False
    bias = torch.full((1, 290), -torch.inf)
    bias[:, 200:] = torch.linspace(least, most, 90)
    case.layout = Layout(150, 173, bias.to(device))
    case.check(case.run(backend))


@pytest.mark.parametrize("backend", ["cuda_fa3"], indirect=True)
@pytest.mark.parametrize("video, share", [(300, 0.1), (900, 0.9)], ids=["few_selected", "most_selected"])
def test_more_clusters_than_a_tile_has_keys(backend, device, monkeypatch, video, share):
    """Virtual keys in several tiles; and several tiles of keys in each of which dozens of clusters end."""
    case = Case(24, device, torch.float16, b=1, h=1, video=video, d=64)
    g, c_k = cases.generator(24), 290
    case.k_labels = torch.randint(c_k, (1, 1, video), generator=g).to(device)
    case.selected = (torch.rand(1, 1, case.selected.shape[2], c_k, generator=g) < share).to(device)
    sizes = torch.bincount(case.k_labels[0, 0], minlength=c_k).cpu()
    assert (sizes == 0).any() and (sizes > 0).sum() > 150 and sizes.max() < 16
    keys, values = (torch.randn(1, 1, c_k, 64, generator=g).to(device) for _ in range(2))
    case.tail = Tail(keys, values, sizes.float().log()[None, None].to(device))
    monkeypatch.setattr(test_dynamic_attention, "C_K", c_k)
    case.check(case.run(backend))


@pytest.mark.parametrize("backend", ["cuda", "cuda_fa3"], indirect=True)
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "token"])
def test_large_offsets(backend, device, tmp_path, axis):
    """As test_large_offsets.py, with strides that the prebuilt kernels read without a copy: multiples of 16 bytes."""
    case = Case(25, device, torch.float16, b=2, h=2, video=40, text=(5, 9), tail=True)
    reach, room = 2**31 + 2**29, 2**20
    if device.type == "cpu":
        memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=reach + 8 * room, dtype=torch.float16)
    else:
        memory = torch.zeros(reach + 8 * room, dtype=torch.float16, device=device)
    views = []
    for place, x in enumerate((case.q, case.k, case.v, torch.empty_like(case.q))):
        strides = list(x.movedim(axis, 0).contiguous().movedim(0, axis).stride())
        strides[axis] = reach // (x.shape[axis] - 1) // 8 * 8
        views.append(memory.as_strided(x.shape, strides, place * room).copy_(x))
        assert (views[-1][-1, -1, -1, -1].data_ptr() - views[-1].data_ptr()) // 2 > 2**31
    q, k, v, out = views
    groups = cases.clusters_of(case.q_labels, C_Q), cases.clusters_of(case.k_labels, C_K)
    dynamic_attention(
        q, k, v, *groups, case.selected, layout=case.layout, scale=case.scale, tail=case.tail, out=out, backend=backend,
    )  # fmt: skip
    video = case.layout.video
    assert torch.equal(out[:, :, video], case.run(backend)[:, :, video])
    (tmp_path / "memory").unlink(missing_ok=True)
