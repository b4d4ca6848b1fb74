"""near_field against fp64: over whatever is selected, with text before, after or around, and its logsumexp."""

import brute_force
import cases
import pytest
import torch
from accuracy import assert_as_good_as_torch
from svg2_pack.svg2_core import Layout
from svg2_pack.svg2_core.ops.near_field import near_field

C_Q, C_K = 6, 13


class Case:
    """video: (start, count) of `n` tokens."""

    def __init__(self, seed, dtype=torch.float32, b=2, h=2, n=190, d=64, video=(0, 190), bias=False, memory="bhnd"):
        g = cases.generator(seed)
        self.q, self.k, self.v = (cases.MEMORY[memory](x.to(dtype)) for x in cases.semantic_qkv(g, b, h, n, d))
        start, count = video
        text_bias = None
        if bias:
            text_bias = torch.randn(b, n - count, generator=g)
            text_bias[:, ::3] = -torch.inf
        self.layout, self.scale = Layout(start, count, text_bias), d**-0.5
        self.q_labels, self.k_labels = (cases.ragged_labels(g, b, h, count, c) for c in (C_Q, C_K))
        self.selected = cases.random_map(g, self.q_labels, self.k_labels, C_Q, C_K)
        x = slice(start, start + count)
        self.groups = (cases.clusters_of(self.q_labels, C_Q, self.q[:, :, x]), cases.clusters_of(self.k_labels, C_K, self.k[:, :, x]))

    def run(self, **kwargs):
        return near_field(self.q, self.k, self.v, *self.groups, self.selected, layout=self.layout, scale=self.scale, **kwargs)

    def truth(self):
        return brute_force.pairs(
            self.q, self.k, self.v, self.q_labels, self.k_labels, self.selected, self.layout.video_start, self.layout.text_bias
        )


LAYOUTS = {"video_only": {}, "text_before": {"video": (30, 160)}, "text_around": {"video": (11, 150)},
           "padded": {"video": (11, 150), "bias": True}}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_it_is_attention_over_what_is_selected(dtype, layout):
    case = Case(1, dtype, **layout)
    out, logsumexp = case.run()
    keys, values, bias = case.truth()
    assert_as_good_as_torch(out, case.q, keys, values, bias, case.scale)
    expected = brute_force.logsumexp(case.q, keys, bias, case.scale)[:, :, case.layout.video]
    assert logsumexp.shape == expected.shape and logsumexp.dtype == torch.float32
    assert (logsumexp - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("d", [16, 80, 96, 128])
@pytest.mark.parametrize("memory", list(cases.MEMORY))
def test_head_dimensions_and_memory(d, memory):
    case = Case(2, d=d, memory=memory, video=(11, 150))
    out, _ = case.run()
    assert_as_good_as_torch(out, case.q, *case.truth(), case.scale)


def test_nothing_selected_is_zero_and_minus_infinity():
    """The far field then has all of the weight. With text, text alone is what is attended to."""
    case = Case(3)
    case.selected[0, 0] = False
    out, logsumexp = case.run()
    assert (out[0, 0] == 0).all() and (logsumexp[0, 0] == -torch.inf).all()
    assert logsumexp[0, 1].isfinite().all()
    case = Case(4, video=(30, 160))
    case.selected[:] = False
    out, logsumexp = case.run()
    keys, values, bias = case.truth()
    assert_as_good_as_torch(out, case.q, keys, values, bias, case.scale)
    assert logsumexp.isfinite().all()


def test_text_that_is_all_padding_counts_for_nothing():
    case = Case(5, video=(30, 160), bias=True)
    case.layout.text_bias.fill_(-torch.inf)
    case.selected[0, 0] = False
    out, logsumexp = case.run()
    assert out.isfinite().all()
    assert (out[0, 0, 30:] == 0).all() and (logsumexp[0, 0] == -torch.inf).all()


def test_the_given_place_is_written_in_full():
    case = Case(6, video=(11, 150))
    given = torch.full_like(case.q, torch.nan)
    out, _ = case.run(out=given)
    assert out is given and torch.equal(out, case.run()[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [({"k": lambda k: k[:, :1]}, "k"), ({"selected": lambda m: m[..., 1:]}, "selected"), ({"selected": lambda m: m.int()}, "selected"),
     ({"layout": lambda _: Layout(0, 200)}, "layout"), ({"layout": lambda _: Layout(0, 190, torch.zeros(3, 0))}, "text_bias"),
     ({"out": lambda _: torch.empty(2, 2, 190, 63)}, "out"), ({"q_clusters": lambda c: c._replace(order=c.order[..., 1:])}, "q_clusters")],
    ids=["k", "selected", "selected-dtype", "layout", "text_bias", "out", "q_clusters"],
)  # fmt: skip
def test_bad_input_is_named(change, named):
    case = Case(7)
    good = {"q": case.q, "k": case.k, "v": case.v, "q_clusters": case.groups[0], "k_clusters": case.groups[1],
            "selected": case.selected, "layout": case.layout, "scale": 0.1, "out": None}  # fmt: skip
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        near_field(**{**good, **{name: edit(good[name]) for name, edit in change.items()}})
