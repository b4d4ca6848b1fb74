"""What the prebuilt kernels have of their own: query tiles of both heights, rows long enough to go round their buffers several
times, tensors past 2^31 elements. What they share with all backends is in test_near_field.py."""

import brute_force
import cases
import pytest
import torch
from accuracy import assert_as_good_as_torch
from large import REACH, ROOM
from svg2_pack.svg2_core import Layout
from svg2_pack.svg2_core.ops.near_field import near_field

pytest.importorskip("triton", reason="the plan is made by Triton, which has no build for this system")

pytestmark = pytest.mark.parametrize("default_backend", ["cuda", "cuda_fa3"], indirect=True)


class Case:
    """One head; query and key clusters of these sizes; text: tokens before and after the video."""

    def __init__(self, seed, device, q_sizes, k_sizes, dtype=torch.float16, d=64, text=(0, 0), share=0.5):
        self.g, self.scale, video = cases.generator(seed), d**-0.5, sum(q_sizes)
        assert sum(k_sizes) == video
        self.q, self.k, self.v = torch.randn(3, 1, 1, video + sum(text), d, generator=self.g).to(device, dtype)
        self.layout = Layout(text[0], video)
        self.labels = [
            torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(video, generator=self.g)][None, None].to(device)
            for sizes in (q_sizes, k_sizes)
        ]
        self.selected = (torch.rand(1, 1, len(q_sizes), len(k_sizes), generator=self.g) < share).to(device)

    def run(self, **kwargs):
        groups = [cases.clusters_of(labels, count) for labels, count in zip(self.labels, self.selected.shape[2:], strict=True)]
        return near_field(self.q, self.k, self.v, *groups, self.selected, layout=self.layout, scale=self.scale, **kwargs)

    def check(self):
        out, logsumexp = self.run()
        keys, values, bias = brute_force.pairs(
            self.q, self.k, self.v, *self.labels, self.selected, self.layout.video_start, self.layout.text_bias
        )
        assert_as_good_as_torch(out, self.q, keys, values, bias, self.scale)
        expected = brute_force.logsumexp(self.q, keys, bias, self.scale)[:, :, self.layout.video]
        assert ((logsumexp - expected).abs() <= 2e-6 * expected.abs().clamp_min(1)).all()


@pytest.mark.parametrize(("d", "text"), [(64, (70, 190)), (128, (0, 0))], ids=["64-text", "128-video"])
def test_many_steps_of_keys(default_backend, device, d, text):
    """Of 1 to 128 query rows, over the ring of buffers and from one query tile to the next; odd and even numbers of steps."""
    case = Case(1, device, (1, 64, 65, 128, 129, 200, 333), (500, 3, 0, 17, 16, 300, 84), d=d, text=text)
    case.selected[0, 0] = torch.arange(7, device=device)[:, None] >= torch.tensor([0, 0, 0, 1, 2, 3, 5], device=device)
    if sum(text):
        bias = torch.randn(1, sum(text), generator=case.g)
        bias[torch.rand(bias.shape, generator=case.g) < 0.3] = -torch.inf
        case.layout = Layout(text[0], case.layout.video_len, bias.to(device))
    case.check()


@pytest.mark.parametrize("least, most", [(-30, 30), (-700, -600)])
def test_large_text_biases(default_backend, device, least, most):
    """A step that is masked altogether comes first, in both heights of tiles; and no logit is anywhere near 0."""
    case = Case(2, device, (40, 133), (100, 73), text=(150, 140), share=0.0)
    bias = torch.full((1, 290), -torch.inf)
    bias[:, 200:] = torch.linspace(least, most, 90)
    case.layout = Layout(150, 173, bias.to(device))
    case.check()


def test_text_that_its_bias_leaves_out_may_be_no_number(default_backend, device):
    case = Case(3, device, (40, 110), (100, 50), torch.bfloat16, text=(9, 21))
    bias = torch.zeros(1, 30)
    bias[:, 4:17] = -torch.inf
    case.layout = Layout(9, 150, bias.to(device))
    out, logsumexp = case.run()
    text = case.layout.text_index(180, device)[4:17]
    case.k[:, :, text], case.v[:, :, text] = torch.nan, torch.inf
    again = case.run()
    assert torch.equal(again[0][:, :, case.layout.video], out[:, :, case.layout.video]) and torch.equal(again[1], logsumexp)


def test_clusters_smaller_than_a_granule(default_backend, device):
    """Hundreds of them: every granule has padding, and every step has keys of several clusters."""
    case = Case(4, device, (150, 150), [2, 0, 1, 3] * 50, share=0.7)
    case.check()


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "token"])
def test_large_offsets(default_backend, device, memory, axis):
    """As test_large_offsets.py, with strides that are read without a copy: multiples of 16 bytes."""
    g, b, h, n, d, video = cases.generator(5), 2, 2, 54, 64, slice(5, 45)
    near = [*torch.randn(3, b, h, n, d, generator=g).to(device, torch.float16), torch.empty(b, h, n, d, dtype=torch.float16, device=device)]
    labels = [cases.ragged_labels(g, b, h, 40, count).to(device) for count in (4, 5)]
    groups = [cases.clusters_of(x, count) for x, count in zip(labels, (4, 5), strict=True)]
    selected = cases.random_map(g, *labels, 4, 5).to(device)
    far = []
    for place, x in enumerate(near):
        strides = list(x.movedim(axis, 0).contiguous().movedim(0, axis).stride())
        strides[axis] = REACH // (x.shape[axis] - 1) // 8 * 8
        far.append(memory.as_strided(x.shape, strides, place * ROOM).copy_(x))
        assert (far[-1][-1, -1, -1, -1].data_ptr() - far[-1].data_ptr()) // 2 > 2**31
    sums = [
        near_field(q, k, v, *groups, selected, layout=Layout(5, 40), scale=0.2, out=out)[1] for q, k, v, out in (near, far)
    ]
    assert torch.equal(near[3][:, :, video], far[3][:, :, video]) and torch.equal(*sums)
