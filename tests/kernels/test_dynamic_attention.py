"""dynamic_attention against fp64, on ragged partitions and in awkward memory."""

import brute_force
import cases
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_good_as_torch, errors
from svg2_pack.svg2_core.layout import Layout
from svg2_pack.svg2_core.ops.dynamic_attention import Tail, dynamic_attention

C_Q, C_K = 7, 11
# Text tokens before and after the video's.
LAYOUTS = {"video_only": (0, 0), "text_before": (17, 0), "text_after": (0, 13), "text_around": (9, 21)}


class Case:
    """One call: q, k, v, a ragged partition of the video tokens, a random map, and the truth's view of all that."""

    def __init__(self, seed, device, dtype, b=2, h=3, video=173, d=64, text=(0, 0), tail=False, bias=False, spread=1.0,
                 memory=("bhnd", "bhnd", "bhnd")):  # fmt: skip
        g = cases.generator(seed)
        n = text[0] + video + text[1]
        self.scale = d**-0.5
        self.q, self.k, self.v = (
            cases.MEMORY[where]((torch.randn(b, h, n, d, generator=g) * s).to(device, dtype))
            for where, s in zip(memory, (spread, spread, 1.0), strict=True)
        )
        self.q_labels = cases.ragged_labels(g, b, h, video, C_Q).to(device)
        self.k_labels = cases.ragged_labels(g, b, h, video, C_K).to(device)
        self.selected = cases.random_map(g, self.q_labels, self.k_labels, C_Q, C_K).to(device)
        text_bias = None
        if bias:
            text_bias = torch.randn(b, sum(text), generator=g)
            text_bias[torch.rand(b, sum(text), generator=g) < 0.3] = -torch.inf
            text_bias = text_bias.to(device)
        self.layout = Layout(text[0], video, text_bias)
        self.tail = None
        if tail:
            # Any virtual keys, not only centroids: the op's contract does not say where they come from.
            biases = torch.stack([(self.k_labels == c).sum(-1) for c in range(C_K)], -1).float().log()
            keys, values = (torch.randn(b, h, C_K, d, generator=g).to(device) for _ in range(2))
            self.tail = Tail(keys, values, biases)

    def run(self, backend, rows=slice(None)):
        layout = self.layout
        if layout.text_bias is not None:
            layout = Layout(layout.video_start, layout.video_len, layout.text_bias[rows])
        return dynamic_attention(
            self.q[rows], self.k[rows], self.v[rows],
            cases.clusters_of(self.q_labels[rows], C_Q), cases.clusters_of(self.k_labels[rows], C_K),
            self.selected[rows], layout=layout, scale=self.scale,
            tail=None if self.tail is None else Tail(*(t[rows] for t in self.tail)), backend=backend,
        )  # fmt: skip

    def check(self, result):
        truth = brute_force.pairs(
            self.q, self.k, self.v, self.q_labels, self.k_labels, self.selected,
            self.layout.video_start, self.layout.text_bias, self.tail,
        )  # fmt: skip
        assert_as_good_as_torch(result, self.q, *truth, self.scale)


@pytest.mark.parametrize("tail", [False, True], ids=["drop", "tail"])
@pytest.mark.parametrize("text", LAYOUTS.values(), ids=LAYOUTS)
def test_ragged_partitions(backend, dtype, device, text, tail):
    case = Case(1, device, dtype, text=text, tail=tail)
    sizes = torch.stack([(case.k_labels == c).sum(-1) for c in range(C_K)])
    assert sizes.min() == 0 and (sizes == 1).any() and sizes.max() > 60  # the inputs are what the test claims
    case.check(case.run(backend))


@pytest.mark.parametrize("d", [64, 80, 96, 128])
def test_head_dims(backend, dtype, device, d):
    case = Case(2, device, dtype, b=1, h=2, video=101, d=d, text=(5, 3), tail=True)
    case.check(case.run(backend))


@pytest.mark.parametrize("video", [1, 2, 15, 64, 129])
def test_lengths(backend, device, precise, video):
    case = Case(3, device, precise, b=1, h=2, video=video, text=(2, 0), tail=True)
    case.check(case.run(backend))


@pytest.mark.parametrize("tail", [False, True], ids=["drop", "tail"])
@pytest.mark.parametrize("text", [(17, 0), (9, 21)], ids=["text_before", "text_around"])
def test_key_padding_bias_on_text(backend, dtype, device, text, tail):
    case = Case(4, device, dtype, text=text, tail=tail, bias=True)
    assert case.layout.text_bias.isinf().any() and case.layout.text_bias.isfinite().any()
    case.check(case.run(backend))


def test_all_text_padded_away_equals_no_text_to_the_video(backend, device, precise):
    case = Case(5, device, precise, text=(9, 21), tail=True)
    case.layout = Layout(9, 173, torch.full((2, 30), -torch.inf, device=device))
    case.check(case.run(backend))


@pytest.mark.parametrize(
    "memory",
    [
        ("bnhd", "bnhd", "bnhd"),
        ("packed", "packed", "packed"),
        ("bnhd", "bnhd", "bhnd"),
        ("bhnd", "packed", "bnhd"),
        ("every_second", "every_second", "every_second"),
    ],
    ids="-".join,
)
def test_memory_layouts(backend, dtype, device, memory):
    """Values are right, and the result's dimensions are ordered in memory as q's."""
    case = Case(6, device, dtype, text=(3, 4), memory=memory)
    assert not (case.q.is_contiguous() and case.k.is_contiguous() and case.v.is_contiguous())
    result = case.run(backend)
    case.check(result)

    def by_stride(x):
        return sorted(range(4), key=x.stride, reverse=True)

    assert by_stride(result) == by_stride(case.q)
    assert result.transpose(1, 2).is_contiguous() == (memory[0] in ("bnhd", "packed"))


def test_inputs_are_left_alone(backend, dtype, device):
    case = Case(7, device, dtype, text=(3, 4), tail=True, bias=True)
    before = [t.clone() for t in (case.q, case.k, case.v, case.selected, *case.tail, case.layout.text_bias)]
    case.run(backend)
    after = (case.q, case.k, case.v, case.selected, *case.tail, case.layout.text_bias)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_large_logits(backend, device, precise):
    """Logits up to 1e5: exp of them overflows any float unless the row's maximum is taken off."""
    case = Case(8, device, precise, spread=120.0, text=(3, 4), tail=True)
    assert (case.scale * case.q @ case.k.transpose(-1, -2)).max() > 5e4
    case.check(case.run(backend))


def test_everything_selected_equals_dense(backend, dtype, device):
    """With all pairs selected the partition and the tail cannot matter."""
    case = Case(9, device, dtype, text=(9, 21), tail=True)
    case.selected = torch.ones_like(case.selected)
    result = case.run(backend)
    dense = F.scaled_dot_product_attention(case.q.double(), case.k.double(), case.v.double())
    torchs = F.scaled_dot_product_attention(case.q, case.k, case.v)
    assert errors(result, dense)[0] <= 2 * errors(torchs, dense)[0] + torch.finfo(dtype).eps / 2


def test_scale_is_used(backend, device, precise):
    case = Case(10, device, precise, tail=True)
    case.scale = 0.7
    case.check(case.run(backend))


@pytest.mark.parametrize("tail", [False, True], ids=["drop", "tail"])
def test_unselected_keys_are_not_touched(backend, dtype, device, tail):
    """Keys that no query selects are gathered by none: even NaN there changes nothing."""
    case = Case(11, device, dtype, tail=tail)
    case.selected[..., 4] = False
    used = ~(case.k_labels == 4)
    for i in range(2):
        for j in range(3):
            case.selected[i, j, :, case.k_labels[i, j][used[i, j]][0]] = True  # no row is left without a key
    before = case.run(backend)
    assert not used.all()
    case.k = torch.where(used[..., None], case.k, torch.nan)
    case.v = torch.where(used[..., None], case.v, torch.nan)
    assert torch.equal(case.run(backend), before)


def test_a_row_does_not_depend_on_its_batch(backend, dtype, device):
    case = Case(12, device, dtype, b=3, d=64 if backend.startswith("cuda") else 80, text=(3, 4), tail=True, bias=True, memory=("bnhd", "bnhd", "packed"))
    together = case.run(backend)
    for i in range(3):
        assert torch.equal(case.run(backend, slice(i, i + 1))[0], together[i])


def test_same_bits_every_time(backend, dtype, device):
    case = Case(13, device, dtype, text=(3, 4), tail=True)
    assert torch.equal(case.run(backend), case.run(backend))


def _call(backend, device, dtype, **changes):
    case = Case(14, device, dtype, b=2, h=2, video=20, text=(2, 3))
    arguments = {
        "q": case.q, "k": case.k, "v": case.v,
        "q_clusters": cases.clusters_of(case.q_labels, C_Q), "k_clusters": cases.clusters_of(case.k_labels, C_K),
        "block_map": case.selected, "layout": case.layout, "scale": 0.1, "backend": backend,
    }  # fmt: skip
    return dynamic_attention(**{**arguments, **{name: change(arguments[name]) for name, change in changes.items()}})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": lambda k: k[:, :, 1:]}, "k"),
        ({"v": lambda v: v[:, :1]}, "v"),
        ({"v": lambda v: v[..., :32]}, "v"),
        ({"layout": lambda _: Layout(6, 20)}, "layout"),
        ({"layout": lambda _: Layout(2, 20, torch.zeros(2, 4))}, "text_bias"),
        ({"layout": lambda _: Layout(2, 20, torch.zeros(1, 5))}, "text_bias"),
        ({"layout": lambda _: Layout(2, 20, torch.zeros(5))}, "text_bias"),
        ({"q_clusters": lambda c: c._replace(order=c.order[..., 1:])}, "q_clusters"),
        ({"k_clusters": lambda c: c._replace(order=c.order[:1])}, "k_clusters"),
        ({"block_map": lambda m: m[..., :-1]}, "block_map"),
        ({"block_map": lambda m: m.float()}, "block_map"),
    ],
    ids=["k-tokens", "v-heads", "v-dim", "video-range", "bias-length", "bias-batch", "bias-dims", "q-order", "k-order",
         "map-shape", "map-dtype"],
)  # fmt: skip
def test_bad_input_is_named(backend, device, precise, change, named):
    _call(backend, device, precise)  # right as it stands
    with pytest.raises(ValueError, match=named):
        _call(backend, device, precise, **change)
