"""select_by_error against fp64, pair by pair."""

from functools import lru_cache
from itertools import pairwise

import brute_force
import cases
import pytest
import torch
from svg2_pack.svg2_core.ops.moments import moments
from svg2_pack.svg2_core.ops.select import select_by_error

B, H, N, C_Q, C_K, SCALE = 2, 2, 230, 9, 21, 0.125


@lru_cache
def made(seed):
    """Clusters and what is known of them, by the reference: test_moments.py has the backends' own."""
    g = cases.generator(seed)
    q, k, v = cases.semantic_qkv(g, B, H, N, 64)
    q_groups = cases.clusters_of(cases.ragged_labels(g, B, H, N, C_Q), C_Q, q)
    k_groups = cases.clusters_of(cases.ragged_labels(g, B, H, N, C_K), C_K, k)
    return q_groups, k_groups, moments(q, k, v, q_groups, k_groups, scale=SCALE, directions=4, backend="torch")


def pairs(q_groups, k_groups, selected):
    return (q_groups.sizes.double()[..., None] * k_groups.sizes.double()[:, :, None] * selected).sum((2, 3))


@pytest.mark.parametrize("dropped", [False, True], ids=["stand-ins", "dropped"])
@pytest.mark.parametrize("density", [0.003, 0.02, 0.1, 0.4, 0.9])
def test_takes_what_is_worth_most_per_key(density, dropped):
    q_groups, k_groups, known = made(1)
    selected, _ = select_by_error(q_groups, k_groups, known, density=density, scale=SCALE, dropped=dropped)
    for i in range(B):
        for j in range(H):
            expected, margin = brute_force.by_error(
                q_groups.centroids[i, j], k_groups.centroids[i, j], q_groups.sizes[i, j], k_groups.sizes[i, j],
                [x[i, j] for x in known[:4]], density, SCALE, dropped,
            )  # fmt: skip
            assert margin > 1e-5, "a tie: rounding may decide"
            assert torch.equal(selected[i, j], expected)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.4])
def test_density_is_reached_and_never_passed(density):
    """To within the largest pair of clusters, of which one more would be too much."""
    q_groups, k_groups, known = made(2)
    selected, _ = select_by_error(q_groups, k_groups, known, density=density, scale=SCALE)
    got = pairs(q_groups, k_groups, selected) / N**2
    largest = q_groups.sizes.amax(2) * k_groups.sizes.amax(2) / N**2
    assert (got <= density).all() and (got > density - largest).all()


def test_more_density_keeps_what_less_took():
    q_groups, k_groups, known = made(3)
    maps = [select_by_error(q_groups, k_groups, known, density=d, scale=SCALE) for d in (0.02, 0.1, 0.3, 0.8, 1.0)]
    for (less, error), (more, lower) in pairwise(maps):
        assert (more | ~less).all() and (more & ~less).any()
        assert (lower < error).all()
    assert (maps[-1][1] == 0).all()


def test_a_density_of_one_takes_all_by_rule():
    """Also where rounding, or worths that are no numbers, would leave something out."""
    q_groups, k_groups, known = made(4)
    filled = (q_groups.sizes > 0)[..., None] & (k_groups.sizes > 0)[:, :, None]
    broken = known._replace(variance=known.variance.clone().fill_(torch.nan))
    for moments_ in (known, broken):
        selected, _ = select_by_error(q_groups, k_groups, moments_, density=1.0, scale=SCALE)
        assert torch.equal(selected, filled)


def test_nothing_empty_is_taken():
    q_groups, k_groups, known = made(5)
    assert (q_groups.sizes == 0).any() and (k_groups.sizes == 0).any()
    for dropped in (False, True):
        selected, _ = select_by_error(q_groups, k_groups, known, density=0.99, scale=SCALE, dropped=dropped)
        assert not selected[q_groups.sizes == 0].any() and not selected.transpose(2, 3)[k_groups.sizes == 0].any()


def test_what_is_not_a_number_is_computed_first():
    q_groups, k_groups, known = made(6)
    j = int(k_groups.sizes[0, 0].argmax())
    variance = known.variance.clone()
    variance[0, 0, :, j] = torch.inf
    selected, _ = select_by_error(q_groups, k_groups, known._replace(variance=variance), density=0.9, scale=SCALE)
    assert selected[0, 0, q_groups.sizes[0, 0] > 0, j].all()


def test_where_nothing_stands_in_each_query_cluster_has_something():
    q_groups, k_groups, known = made(7)
    selected, _ = select_by_error(q_groups, k_groups, known, density=1e-6, scale=SCALE, dropped=True)
    assert torch.equal(selected.sum(-1) == 1, q_groups.sizes > 0)
    selected, _ = select_by_error(q_groups, k_groups, known, density=1e-9, scale=SCALE)
    assert not selected.any(), "where something stands in, nothing need be exact"


def test_rows_and_heads_are_their_own_business():
    q_groups, k_groups, known = made(8)
    whole, error = select_by_error(q_groups, k_groups, known, density=0.07, scale=SCALE)
    for i in range(B):
        for j in range(H):
            one = [type(t)(*(x[i : i + 1, j : j + 1] for x in t)) for t in (q_groups, k_groups, known)]
            selected, alone = select_by_error(*one, density=0.07, scale=SCALE)
            assert torch.equal(selected[0, 0], whole[i, j]) and torch.equal(alone[0, 0], error[i, j])


@pytest.mark.parametrize("density", [0.0, -0.1, float("nan")])
def test_bad_density_is_named(density):
    q_groups, k_groups, known = made(9)
    with pytest.raises(ValueError, match="density"):
        select_by_error(q_groups, k_groups, known, density=density, scale=SCALE)


@pytest.mark.parametrize("budget", [0, 1, 5_000, 123_456, 10**9])
def test_counting_by_buckets_is_sorting(budget):
    """Ties in plenty, zeros, infinities and what is not to be taken."""
    from svg2_pack.svg2_core.ops.select import reference, sdpa

    g = cases.generator(40)
    worth = torch.rand(4000, generator=g).mul(12).round() / 12
    worth[::7] = torch.rand(572, generator=g) * 1e-6 + 0.25
    worth[::11], worth[::13], worth[::17] = 0.0, -1.0, torch.inf
    pairs = torch.randint(0, 400, (4000,), generator=g).double()
    budget = torch.tensor(float(budget)).double()
    assert torch.equal(sdpa.within_budget(worth, pairs, budget), reference.within_budget(worth, pairs, budget))
