"""far_field against fp64, from its definition; and the laws that it has to keep whatever the data."""

import brute_force
import cases
import pytest
import torch
import torch.nn.functional as F
from accuracy import errors
from svg2_pack.svg2_core import Layout
from svg2_pack.svg2_core.ops.exact_rows import ExactRows, exact_rows
from svg2_pack.svg2_core.ops.far_field import far_field
from svg2_pack.svg2_core.ops.moments import moments
from svg2_pack.svg2_core.ops.near_field import near_field

C_Q, C_K = 6, 13


class Case:
    """One call from clusters to the far field. q_labels, k_labels: `[B, H, V]`, else ragged; part: which tokens ask, all of them
    the video's."""

    def __init__(self, seed, b=2, h=2, n=190, d=64, video=None, c_q=C_Q, c_k=C_K, q_labels=None, k_labels=None,
                 dtype=torch.float32, directions=8, factor=1.0, edit=None, part=None):  # fmt: skip
        g = cases.generator(seed)
        start, count = video or (0, n)
        q, k, v = cases.semantic_qkv(g, b, h, n, d)
        if edit:
            q, k, v = edit(q, k, v)
        self.q, self.k, self.v = (factor * q).to(dtype), k.to(dtype), v.to(dtype)
        self.c_q, self.c_k, self.scale = c_q, c_k, d**-0.5
        self.layout = Layout(start, count, queries=part and (0, part.stop - part.start))
        self.q = self.q[:, :, part or slice(None)]
        self.video, asking = self.layout.video_queries, self.layout.queries_len
        self.q_labels = cases.ragged_labels(g, b, h, asking, c_q) if q_labels is None else q_labels.expand(b, h, asking)
        self.k_labels = cases.ragged_labels(g, b, h, count, c_k) if k_labels is None else k_labels.expand(b, h, count)
        self.selected = cases.random_map(g, self.q_labels, self.k_labels, c_q, c_k)
        tokens = [self.q[:, :, self.video], *(x[:, :, self.layout.video] for x in (self.k, self.v))]
        self.groups = cases.clusters_of(self.q_labels, c_q, tokens[0]), cases.clusters_of(self.k_labels, c_k, tokens[1])
        self.known = moments(*tokens, *self.groups, scale=self.scale, directions=directions)

    def exact(self) -> ExactRows:
        return exact_rows(self.q, self.k, self.v, self.layout, scale=self.scale, seed=0, first_head=0)

    def run(self, order=1):
        """-> out, near, logsumexp, share of the matrix"""
        args = self.q, self.k, self.v
        options = {"layout": self.layout, "scale": self.scale}
        near, logsumexp = near_field(*args, *self.groups, self.selected, **options)
        out = near.clone()
        share = far_field(*args, out, logsumexp, *self.groups, self.known, self.selected, order=order, exact=self.exact(), **options)
        return out, near, logsumexp, share

    def dense(self):
        return F.scaled_dot_product_attention(self.q.double(), self.k.double(), self.v.double(), scale=self.scale)

    def truth(self, near, logsumexp, share, order):
        """Video queries' result by the definition in fp64, from the near field given."""
        rows = []
        for i in range(len(self.q)):
            for j in range(self.q.shape[1]):
                known = [x[i, j] for x in (self.known.log_mass, self.known.directions, self.known.direction_variances)]
                far = brute_force.far_field(
                    self.q[i, j, self.video], *(x[i, j, self.layout.video] for x in (self.k, self.v)), self.q_labels[i, j], self.k_labels[i, j],
                    self.selected[i, j], self.scale, order, known,
                )  # fmt: skip
                rows.append(brute_force.merged(near[i, j, self.video], logsumexp[i, j], far, share[i, j].double()))
        return torch.stack(rows).unflatten(0, self.q.shape[:2])


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("video", [(0, 190), (30, 160), (11, 150)], ids=["video_only", "text_before", "text_around"])
@pytest.mark.parametrize("factor", [1.0, 4.0], ids=["usual", "sharp"])
def test_it_is_its_definition(order, video, factor):
    case = Case(1, video=video, factor=factor)
    out, near, logsumexp, share = case.run(order)
    truth = case.truth(near, logsumexp, share, order)
    assert errors(out[:, :, case.video], truth)[0] <= 3e-6
    text = [t for t in range(190) if not video[0] <= t < sum(video)]
    assert torch.equal(out[:, :, text], near[:, :, text]), "text queries have no far field"
    assert (share <= 1.5).all() and ((share > 0).any() if order else (share == 0).all())


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("video", [(0, 190), (11, 150)], ids=["video_only", "text_around"])
def test_queries_that_are_a_part(order, video):
    case = Case(2, video=video, part=slice(40, 101))
    out, near, logsumexp, share = case.run(order)
    assert out.shape == (2, 2, 61, 64) and logsumexp.shape == (2, 2, 61)
    assert errors(out, case.truth(near, logsumexp, share, order))[0] <= 3e-6
    assert (share > 0).any() if order else (share == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("order", [0, 1])
def test_in_16_bits(dtype, order):
    case = Case(2, dtype=dtype)
    out, near, logsumexp, share = case.run(order)
    assert errors(out, case.truth(near, logsumexp, share, order))[0] <= torch.finfo(dtype).eps


def test_the_share_is_the_one_that_serves_the_exact_rows_best():
    case = Case(3, h=1, b=1)
    _, near, logsumexp, share = case.run()
    exact = case.exact()
    rows = exact.rows[0]

    def loss(value):
        truth = case.truth(near, logsumexp, torch.full((1, 1), value), 1)[0, 0, rows]
        return (truth - exact.out[0, 0].double()).square().sum().item()

    best = share.item()
    assert 0 < best < 1.5 and loss(best) < min(loss(best - 0.02), loss(best + 0.02), loss(0.0))


# Laws.


def test_all_selected_is_dense():
    """Nothing is left to represent: the far field weighs nothing, and nothing becomes 0 / 0."""
    case = Case(4)
    case.selected[:] = True
    for order in (0, 1):
        out, near, *_ = case.run(order)
        assert torch.equal(out, near)
        assert errors(out, case.dense())[0] <= 1e-6


def test_some_rows_of_pairs_all_selected_and_some_not_at_all():
    case = Case(5)
    case.selected[:, :, 0], case.selected[:, :, 1] = True, False
    out, near, logsumexp, share = case.run()
    assert out.isfinite().all()
    assert errors(out, case.truth(near, logsumexp, share, 1))[0] <= 3e-6


@pytest.mark.parametrize("selects", ["some", "none"])
def test_one_token_per_key_cluster_is_dense(default_backend, selects):
    """A token at its own centroid is represented exactly, whatever is selected."""
    n, h = cases.sized(default_backend, (190, 2), (77, 1))
    case = Case(6, h=h, n=n, k_labels=torch.randperm(n, generator=cases.generator(0)), c_k=n)
    if selects == "none":
        case.selected[:] = False
    out, *_ = case.run()
    assert errors(out, case.dense())[0] <= 2e-6


def test_each_query_its_own_cluster_has_the_denominator_of_dense(default_backend):
    """log_mass is exact at the query itself. Where values are constant within key clusters, so is the result."""
    b, h, n = cases.sized(default_backend, (2, 2, 190), (1, 1, 77))
    constant = cases.ragged_labels(cases.generator(7), 1, 1, n, C_K)

    def edit(q, k, v):
        return q, k, torch.randn(C_K, 64, generator=cases.generator(8))[constant[0, 0]].expand(q.shape)

    case = Case(7, b, h, n, q_labels=torch.arange(n), c_q=n, k_labels=constant, edit=edit)
    for selected in (torch.zeros_like(case.selected), case.selected.clone()):
        case.selected = selected
        out, *_ = case.run()
        assert errors(out, case.dense())[0] <= 3e-6
    # The denominator of any values: that of ones.
    ones = Case(7, b, h, n, q_labels=torch.arange(n), c_q=n, k_labels=constant, edit=lambda q, k, v: (q, k, torch.ones_like(v)))
    ones.selected[:] = False
    assert (ones.run()[0] - 1).abs().max() <= 1e-6
    far = brute_force.far_field(
        *(x[0, 0] for x in (case.q, case.k, case.v)), case.q_labels[0, 0], case.k_labels[0, 0], torch.zeros(n, C_K, dtype=torch.bool),
        case.scale, 1, [x[0, 0] for x in (case.known.log_mass, case.known.directions, case.known.direction_variances)],
    )  # fmt: skip
    dense = (case.scale * case.q[0, 0].double() @ case.k[0, 0].double().T).logsumexp(-1)
    assert (far[1].log() + far[3] - dense).abs().max() <= 1e-5


def test_one_cluster_of_identical_queries_is_the_query_s_own_first_order():
    """The matrix is then that of the query itself: sum_j softmax_j C_j."""

    def edit(q, k, v):
        return q[:, :, :1].expand(q.shape).contiguous(), k, v

    case = Case(9, q_labels=torch.zeros(190, dtype=torch.long), c_q=1, edit=edit, h=1, b=1)
    case.selected[:] = False
    out, _, _, share = case.run()
    q, k, v = (x[0, 0].double() for x in (case.q, case.k, case.v))
    labels, mass, mean = case.k_labels[0, 0], torch.zeros(C_K, dtype=torch.float64), torch.zeros(C_K, 64, dtype=torch.float64)
    for j in labels.unique().tolist():
        ks, vs = k[labels == j], v[labels == j]
        covariance = (vs - vs.mean(0)).T @ (ks - ks.mean(0)) / len(ks)
        mass[j] = (case.scale * ks @ q[0]).exp().sum()
        mean[j] = vs.mean(0) + share.item() * case.scale * covariance @ q[0]
    truth = (mass / mass.sum()) @ mean
    assert errors(out[0, 0, 0], truth)[0] <= 3e-6
    assert torch.equal(out[0, 0], out[0, 0, :1].expand(190, 64))


def test_empty_clusters_and_clusters_without_extent():
    constant = Case(10, b=1, edit=lambda q, k, v: (q, torch.ones_like(k), v))
    out, *_ = constant.run()
    assert errors(out, constant.dense())[0] < 1 and out.isfinite().all()
    same = Case(11, b=1, edit=lambda q, k, v: (torch.ones_like(q), k, v))
    assert same.run()[0].isfinite().all()


def test_a_head_is_its_own_business():
    case = Case(12)
    whole = case.run()[0]
    for i, j in ((0, 1), (1, 0)):
        row, head = slice(i, i + 1), slice(j, j + 1)
        groups, known = ([type(t)(*(x[row, head] for x in t)) for t in group] for group in (case.groups, [case.known]))
        tokens = [x[row, head] for x in (case.q, case.k, case.v)]
        near, logsumexp = near_field(*tokens, *groups, case.selected[row, head], layout=case.layout, scale=case.scale)
        exact = exact_rows(*tokens, case.layout, scale=case.scale, seed=0, first_head=j)
        far_field(*tokens, near, logsumexp, *groups, *known, case.selected[row, head], layout=case.layout, scale=case.scale, order=1, exact=exact)  # fmt: skip
        assert torch.equal(near[0, 0], whole[i, j])


@pytest.mark.parametrize(
    ("change", "named"),
    [({"order": lambda _: 2}, "order"), ({"selected": lambda m: m[..., 1:]}, "selected"), ({"logsumexp": lambda x: x[..., 1:]}, "logsumexp"),
     ({"exact": lambda e: e._replace(rows=e.rows[:, 1:])}, "exact")],
    ids=["order", "selected", "logsumexp", "exact"],
)  # fmt: skip
def test_bad_input_is_named(change, named):
    case = Case(13, b=1, h=1, n=50)
    near, logsumexp = near_field(case.q, case.k, case.v, *case.groups, case.selected, layout=case.layout, scale=case.scale)
    good = {"q": case.q, "k": case.k, "v": case.v, "out": near, "logsumexp": logsumexp, "q_clusters": case.groups[0],
            "k_clusters": case.groups[1], "moments": case.known, "selected": case.selected, "layout": case.layout,
            "scale": case.scale, "order": 1, "exact": case.exact()}  # fmt: skip
    with pytest.raises(ValueError, match=rf"far_field: .*\b{named}\b"):
        far_field(**{**good, **{name: edit(good[name]) for name, edit in change.items()}})
