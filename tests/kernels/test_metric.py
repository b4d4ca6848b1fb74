"""The metric of the logits: its directions against exact eigenvectors, its distances against logits, and inputs without extent."""

import cases
import pytest
import torch
from svg2_pack.svg2_core.ops.kmeans import logit_spaces
from svg2_pack.svg2_core.ops.kmeans.metric import centre, leading_directions, points_in, second_moment
from svg2_pack.svg2_core.ops.kmeans.metric import project as project_centred
from svg2_pack.svg2_core.ops.kmeans.metric import spaces as spaces_of_centred

RANK = 32


def spaces(q, k, *args, **kwargs):
    return spaces_of_centred(centre(q), centre(k), *args, **kwargs)


def project(x, projection):
    return project_centred(centre(x), projection)


def tokens(seed, n=600, d=64, spectrum=0.9):
    """`[N, D]` whose directions fall off like spectrum^i, turned."""
    g = cases.generator(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    return torch.randn(n, d, generator=g) * spectrum ** torch.arange(d) @ turn


def exact(covariance, metric):
    """Generalised eigenvalues of both, ascending, by the square root of the metric."""
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return torch.linalg.eigvalsh(root @ covariance @ root)


@pytest.mark.parametrize("spectrum", [0.98, 0.9, 0.6], ids=["flat", "usual", "steep"])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_directions_catch_what_eigenvectors_do(spectrum, rank):
    covariance, metric = second_moment(centre(tokens(1, spectrum=spectrum)).tokens), second_moment(tokens(2, spectrum=0.95))
    p, z = leading_directions(covariance, metric, rank)
    assert p.shape == z.shape == (64, rank)
    assert (z.T @ metric @ z - torch.eye(rank)).abs().max() <= 1e-6, "orthonormal in the metric"
    assert (p - metric @ z).abs().max() <= 1e-9 * p.abs().max()
    caught, best = (p.T @ covariance @ p).trace(), exact(covariance, metric)[-rank:].sum()
    assert 0.97 * best <= caught <= (1 + 1e-9) * best


def test_leading_directions_come_first():
    covariance, metric = second_moment(centre(tokens(3, spectrum=0.8)).tokens), second_moment(tokens(4))
    p, _ = leading_directions(covariance, metric, RANK)
    variances = (p.T @ covariance @ p).diagonal()
    best = exact(covariance, metric).flip(0)
    assert variances[:8].sum() >= 0.97 * best[:8].sum() and variances[:8].min() > variances[24:].max()


def test_distances_are_differences_of_logits():
    """With all directions: squared distances of keys are mean squared differences of their logits over the queries, and those
    of queries over the keys about their mean."""
    q, k = tokens(5, d=32), tokens(6, d=32)
    for_queries, for_keys = spaces(q, k, 32, scale=0.3)
    y = project(k, for_keys.projection)
    logits = 0.3 * q.double() @ k.double().T
    for a, b in ((0, 1), (5, 400), (17, 18)):
        expected = (logits[:, a] - logits[:, b]).square().mean().item()
        assert (y[a] - y[b]).square().sum().item() == pytest.approx(expected, rel=1e-3)
    y, centred = project(q, for_queries.projection), logits - logits.mean(1, keepdim=True)
    for a, b in ((0, 1), (5, 400)):
        expected = (centred[a] - centred[b]).square().mean().item()
        assert (y[a] - y[b]).square().sum().item() == pytest.approx(expected, rel=1e-3)


def test_a_common_offset_changes_nothing():
    q, k = tokens(7), tokens(8)
    moved = k + 1000 * torch.randn(64, generator=cases.generator(9))
    ours, theirs = (project(x, spaces(q, x, RANK, 0.1)[1].projection) for x in (k, moved))
    distances = [torch.cdist(y[:50], y[:50]) for y in (ours, theirs)]
    assert (distances[0] - distances[1]).norm() <= 2e-3 * distances[0].norm()  # 1000 in fp32 leaves 6e-5 of the tokens


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e7])
def test_any_magnitude(factor):
    q, k = tokens(10), tokens(11)
    usual, scaled = spaces(q, k, RANK, 0.1), spaces(q * factor, k, RANK, 0.1)
    for a, b, power in zip(usual, scaled, (0, 1), strict=True):  # keys are measured by the queries
        assert torch.allclose(a.projection, b.projection / factor**power, rtol=1e-2, atol=1e-3 * a.projection.abs().max().item())


DEGENERATE = {
    "constant": lambda x: torch.ones_like(x),
    "zero": torch.zeros_like,
    "few": lambda x: x[:5],
    "one": lambda x: x[:1],
    "low rank": lambda x: torch.cat([x[:, :3], torch.zeros_like(x[:, 3:])], 1),
    "nan": lambda x: torch.cat([x[:-1], torch.full_like(x[:1], torch.nan)]),
    "inf": lambda x: torch.cat([x[:-1], torch.full_like(x[:1], torch.inf)]),
    "huge": lambda x: torch.cat([x[:-1], torch.full_like(x[:1], 1e38)]),
    "outlier channels": lambda x: x * (1 + 1e3 * (torch.arange(x.shape[1]) < 2)),
}


@pytest.mark.parametrize("queries", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("keys", DEGENERATE.values(), ids=DEGENERATE)
def test_inputs_without_extent(queries, keys):
    q, k = queries(tokens(12)), keys(tokens(13))
    n = min(len(q), len(k))
    past = tuple(space.projection for space in spaces(tokens(14), tokens(15), RANK, 0.1))
    for known in ((None, None), past):
        for x, space in zip((q[:n], k[:n]), spaces(q[:n], k[:n], RANK, 0.1, known), strict=True):
            assert space.projection.isfinite().all() and project(x, space.projection).isfinite().all()
            assert space.transfer is None or space.transfer.isfinite().all()


def test_more_directions_than_rank_do_no_harm():
    """Keys in three directions: 32 directions of the metric hold all of their distances and no more."""
    q, k = tokens(16), DEGENERATE["low rank"](tokens(17))
    y = project(k, spaces(q, k, RANK, 0.1)[1].projection)
    expected = 0.1 * (k[:20, None] - k[None, :20]).double() @ q.double().T
    assert torch.allclose(torch.cdist(y[:20], y[:20]).double(), expected.square().mean(-1).sqrt(), rtol=1e-3, atol=1e-5)


def test_the_past_is_found_again():
    """In another space of the same tokens, points are where the regression puts them."""
    q, k = tokens(18), tokens(19, spectrum=0.8)
    before = spaces(q, k, RANK, 0.1)
    later = spaces(q + 0.3 * tokens(20), k, RANK, 0.1, tuple(space.projection for space in before))
    for x, old, new in zip((q, k), before, later, strict=True):
        moved, there = project(x, old.projection) @ new.transfer, project(x, new.projection)
        assert (moved - there).norm() <= 0.12 * there.norm()
    same = spaces(q, k, RANK, 0.1, tuple(space.projection.half() for space in before))
    for x, old, new in zip((q, k), before, same, strict=True):
        there = project(x, new.projection)
        assert (project(x, old.projection) @ new.transfer - there).norm() <= 2e-3 * there.norm()


def test_a_head_alone_is_the_same_bits():
    q, k = tokens(21), tokens(22)
    a, b = spaces(q, k, RANK, 0.1), spaces(q.clone(), k.clone(), RANK, 0.1)
    assert all(torch.equal(x.projection, y.projection) for x, y in zip(a, b, strict=True))


def heads(*seeds, n=260, **kwargs):
    """Tokens `[1, H, N, D]`, a head for each seed."""
    return torch.stack([tokens(seed, n, **kwargs) for seed in seeds])[None].float()


def test_distances_of_every_backend_are_differences_of_logits(backend):
    """Of each role, about the other's own second moment: the keys', and the queries' with their mean."""
    q, k = heads(31, 32) + 0.5, heads(33, 34, spectrum=0.8)
    found = logit_spaces(q, k, rank=64, scale=0.1, backend=backend)
    for x, other, space in ((q, k - k.mean(2, keepdim=True), found[0]), (k, q, found[1])):
        points = points_in(x[:, :, :20], space).double()
        logits = 0.1 * (x[:, :, :20, None] - x[:, :, None, :20]).double() @ other.double().transpose(-1, -2)[:, :, None]
        expected = logits.square().mean(-1).sqrt()
        assert (torch.cdist(points, points) - expected).norm() <= 2e-2 * expected.norm()


def test_every_backend_finds_the_past_again(backend):
    q, k = heads(35, 36), heads(37, 38, spectrum=0.8)
    before = logit_spaces(q, k, rank=RANK, scale=0.1, backend=backend)
    past = tuple(space.projection for space in before)
    later = logit_spaces(q + 0.3 * heads(39, 40), k, rank=RANK, scale=0.1, past=past, backend=backend)
    for x, old, new in zip((q, k), before, later, strict=True):
        there = (x - new.mean[:, :, None]) @ new.projection
        moved = (x - new.mean[:, :, None]) @ old.projection @ new.transfer
        assert (moved - there).norm() <= 0.15 * there.norm()
