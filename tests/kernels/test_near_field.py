"""near_field against fp64: over whatever is selected, with text before, after or around, and its logsumexp."""

import brute_force
import cases
import pytest
import torch
from accuracy import assert_as_good_as_torch, errors
from emulated_cuda import PREBUILT
from svg2_pack.svg2_core import Layout
from svg2_pack.svg2_core.ops.near_field import near_field

C_Q, C_K = 6, 13


@pytest.fixture
def precise(default_backend) -> torch.dtype:
    """Its most precise dtype."""
    return torch.float16 if default_backend in PREBUILT else torch.float32


class Case:
    """video: (start, count) of `n` tokens; part: (start, count) of the video among `asking` queries that are no more than these."""

    def __init__(self, seed, dtype=torch.float32, b=2, h=2, n=190, d=64, video=(0, 190), bias=False, memory="bhnd", part=None, asking=None):
        g = cases.generator(seed)
        self.q, self.k, self.v = (cases.MEMORY[memory](x.to(dtype)) for x in cases.semantic_qkv(g, b, h, n, d))
        self.q = self.q[:, :, :asking]
        start, count = video
        text_bias = None
        if bias:
            text_bias = torch.randn(b, n - count, generator=g)
            text_bias[:, ::3] = -torch.inf
        self.layout, self.scale = Layout(start, count, text_bias, part), d**-0.5
        self.q_labels = cases.ragged_labels(g, b, h, self.layout.queries_len, C_Q)
        self.k_labels = cases.ragged_labels(g, b, h, count, C_K)
        self.selected = cases.random_map(g, self.q_labels, self.k_labels, C_Q, C_K)
        q, k = self.q[:, :, self.layout.video_queries], self.k[:, :, self.layout.video]
        self.groups = cases.clusters_of(self.q_labels, C_Q, q), cases.clusters_of(self.k_labels, C_K, k)

    def run(self, **kwargs):
        return near_field(self.q, self.k, self.v, *self.groups, self.selected, layout=self.layout, scale=self.scale, **kwargs)

    def truth(self):
        return brute_force.pairs(
            self.q, self.k, self.v, self.q_labels, self.k_labels, self.selected, self.layout.video_start, self.layout.text_bias,
            q_start=self.layout.video_queries.start,
        )  # fmt: skip


LAYOUTS = {"video_only": {}, "text_before": {"video": (30, 160)}, "text_around": {"video": (11, 150)},
           "padded": {"video": (11, 150), "bias": True},
           "part": {"asking": 60, "part": (0, 60)}, "part_and_text": {"video": (11, 150), "bias": True, "asking": 70, "part": (4, 61)}}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_it_is_attention_over_what_is_selected(default_backend, dtype, layout):
    case = Case(1, dtype, **layout)
    out, logsumexp = case.run()
    keys, values, bias = case.truth()
    assert_as_good_as_torch(out, case.q, keys, values, bias, case.scale)
    expected = brute_force.logsumexp(case.q, keys, bias, case.scale)[:, :, case.layout.video_queries]
    assert logsumexp.shape == expected.shape and logsumexp.dtype == torch.float32
    # torch's attention takes biases in its inputs' precision, and the share from which a logsumexp may be read.
    tolerance = 2 * torch.finfo(dtype).eps if default_backend == "sdpa" and dtype != torch.float32 else 1e-5
    assert (logsumexp - expected).abs().max() <= tolerance


@pytest.mark.parametrize("d", [16, 80, 96, 128])
@pytest.mark.parametrize("memory", list(cases.MEMORY))
def test_head_dimensions_and_memory(precise, d, memory):
    """Values are right, and the result's dimensions are ordered in memory as q's."""
    case = Case(2, precise, d=d, memory=memory, video=(11, 150))
    out, _ = case.run()
    assert_as_good_as_torch(out, case.q, *case.truth(), case.scale)
    assert sorted(range(4), key=out.stride) == sorted(range(4), key=case.q.stride)


@pytest.mark.parametrize("count", [4, 15, 64, 129])
def test_lengths(precise, count):
    case = Case(8, precise, b=1, n=count + 2, video=(2, count))
    out, _ = case.run()
    assert_as_good_as_torch(out, case.q, *case.truth(), case.scale)


def test_large_logits(default_backend, precise):
    """Up to 1e5: exp of them overflows any float unless the row's maximum is taken off."""
    case = Case(9, precise, video=(3, 183))
    case.q, case.k = 60 * case.q, 60 * case.k
    assert (case.scale * case.q @ case.k.transpose(-1, -2)).max() > 5e4
    out, logsumexp = case.run()
    keys, values, bias = case.truth()
    assert errors(out, brute_force.attention(case.q, keys, values, bias, case.scale))[0] <= 1e-3
    if default_backend != "sdpa":  # which may read it from a share of the mass: that underflows here
        expected = brute_force.logsumexp(case.q, keys, bias, case.scale)[:, :, case.layout.video]
        assert ((logsumexp - expected).abs() <= 1e-6 * expected).all()


def test_keys_that_nobody_selects_are_not_touched(precise):
    """Even NaN there changes nothing."""
    case = Case(10, precise)
    case.selected[..., 4] = False
    before = case.run()
    used = (case.k_labels != 4)[..., None]
    assert not used.all()
    case.k, case.v = (torch.where(used, x, torch.nan) for x in (case.k, case.v))
    assert all(torch.equal(x, y) for x, y in zip(case.run(), before, strict=True))


def test_a_row_does_not_depend_on_its_batch(precise):
    case = Case(11, precise, video=(3, 180), bias=True, memory="packed")
    out, logsumexp = case.run()
    inputs = [x.clone() for x in (case.q, case.k, case.v, case.selected)]
    for i in range(2):
        row = slice(i, i + 1)
        alone = near_field(
            case.q[row], case.k[row], case.v[row], *(type(x)(*(t[row] for t in x)) for x in case.groups), case.selected[row],
            layout=Layout(3, 180, case.layout.text_bias[row]), scale=case.scale,
        )  # fmt: skip
        assert torch.equal(alone[0][0], out[i]) and torch.equal(alone[1][0], logsumexp[i])
    assert all(torch.equal(x, y) for x, y in zip(inputs, (case.q, case.k, case.v, case.selected), strict=True)), "inputs are left alone"


def test_nothing_selected_is_zero_and_minus_infinity(precise):
    """The far field then has all of the weight. With text, text alone is what is attended to."""
    case = Case(3, precise)
    case.selected[0, 0] = False
    out, logsumexp = case.run()
    assert (out[0, 0] == 0).all() and (logsumexp[0, 0] == -torch.inf).all()
    assert logsumexp[0, 1].isfinite().all()
    case = Case(4, precise, video=(30, 160))
    case.selected[:] = False
    out, logsumexp = case.run()
    keys, values, bias = case.truth()
    assert_as_good_as_torch(out, case.q, keys, values, bias, case.scale)
    assert logsumexp.isfinite().all()


def test_text_that_is_all_padding_counts_for_nothing(precise):
    case = Case(5, precise, video=(30, 160), bias=True)
    case.layout.text_bias.fill_(-torch.inf)
    case.selected[0, 0] = False
    out, logsumexp = case.run()
    assert out.isfinite().all()
    assert (out[0, 0, 30:] == 0).all() and (logsumexp[0, 0] == -torch.inf).all()


def test_the_given_place_is_written_in_full(precise):
    case = Case(6, precise, video=(11, 150))
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
def test_bad_input_is_named(precise, change, named):
    case = Case(7, precise)
    good = {"q": case.q, "k": case.k, "v": case.v, "q_clusters": case.groups[0], "k_clusters": case.groups[1],
            "selected": case.selected, "layout": case.layout, "scale": 0.1, "out": None}  # fmt: skip
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        near_field(**{**good, **{name: edit(good[name]) for name, edit in change.items()}})
