"""select_by_mass against fp64, cluster by cluster."""

import math
from fractions import Fraction

import brute_force
import cases
import pytest
import torch
from svg2_pack.svg2_core.ops.kmeans import Clusters
from svg2_pack.svg2_core.ops.select import select_by_mass


def groups(centroids: torch.Tensor, sizes: torch.Tensor, device) -> Clusters:
    """Clusters of these centroids `[..., C, D]` and sizes `[..., C]`; the order of tokens plays no part in the map."""
    centroids, sizes = centroids.reshape(-1, 1, *centroids.shape[-2:]), sizes.reshape(-1, 1, sizes.shape[-1])
    offsets = torch.cat([torch.zeros_like(sizes[..., :1]), sizes.cumsum(-1)], -1).int()
    order = torch.zeros(len(sizes), 1, int(sizes.sum(-1).max()), dtype=torch.int32)
    return Clusters(order.to(device), offsets.to(device), centroids.float().to(device))


def random_groups(g, c, d, device, spread, largest=200):
    sizes = torch.randint(1, largest, (c,), generator=g)
    sizes[torch.rand(c, generator=g) < 0.15] = 0
    sizes[torch.randint(c, (1,), generator=g)] = largest  # at least one is not empty
    return groups(torch.randn(c, d, generator=g) * spread, sizes, device)


def one_query(k_logits, sizes, device, top_p, min_k_ratio, backend):
    """The map's only row, where the key clusters' scores are `k_logits`."""
    keys = torch.tensor(k_logits, dtype=torch.float32)[:, None]
    return select_by_mass(
        groups(torch.ones(1, 1), torch.ones(1, dtype=torch.int64), device),
        groups(keys, torch.tensor(sizes), device),
        top_p=top_p, min_k_ratio=min_k_ratio, scale=1.0, backend=backend,
    )[0, 0, 0].tolist()  # fmt: skip


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize(("top_p", "min_k_ratio"), [(0.05, 0.0), (0.5, 0.0), (0.9, 0.1), (0.99, 0.0), (0.3, 0.5)])
def test_against_brute_force(backend, device, spread, top_p, min_k_ratio):
    g = cases.generator(int(1000 * spread) + int(100 * top_p))
    decided = rows = 0
    for _ in range(6):
        q, k = random_groups(g, 13, 32, device, spread), random_groups(g, 37, 32, device, spread)
        least = math.ceil(min_k_ratio * 37)
        truth, margin = brute_force.top_p(q.centroids[0, 0], k.centroids[0, 0], k.sizes[0, 0], top_p, least, 32**-0.5)
        result = select_by_mass(q, k, top_p=top_p, min_k_ratio=min_k_ratio, scale=32**-0.5, backend=backend)[0, 0].cpu()
        clear = margin > 1e-5  # some fp32 roundings of scores and sums of order 1 to 10
        assert torch.equal(result[clear], truth[clear])
        decided, rows = decided + int(clear.sum()), rows + len(clear)
    assert decided > 0.9 * rows  # the comparison is of nearly all rows


def test_the_crossing_cluster_and_no_more(backend, device):
    """The selected mass reaches top_p, and would not without its lightest cluster."""
    g = cases.generator(7)
    for trial in range(20):
        top_p = 0.1 + 0.85 * torch.rand(1, generator=g).item()
        q, k = random_groups(g, 9, 16, device, 1.5), random_groups(g, 41, 16, device, 1.5)
        selected = select_by_mass(q, k, top_p=top_p, min_k_ratio=0.0, scale=0.25, backend=backend)[0, 0].cpu()
        scores = 0.25 * (q.centroids.double() @ k.centroids.double().mT)[0, 0].cpu()
        mass = (scores + k.sizes[0, 0].cpu().double().log()).softmax(-1)
        reached = torch.where(selected, mass, 0.0).sum(-1)
        lightest = torch.where(selected, mass, torch.inf).min(-1).values
        heaviest_left = torch.where(selected, 0.0, mass).max(-1).values
        assert (reached >= top_p - 1e-6).all(), trial
        assert (reached - lightest < top_p + 1e-6).all(), trial
        assert (lightest >= heaviest_left - 1e-6).all(), trial


@pytest.mark.parametrize("ratio", ["0.07", "0.1", "0.25", "0.29", "0.5", "1"])
def test_minimum_ratio(backend, device, ratio):
    """One cluster holds all the mass; the minimum brings the next best, ceil(ratio * Ck) in all."""
    g = cases.generator(8)
    logits = [100.0, *(torch.randperm(99, generator=g) / 10).tolist()]
    least = math.ceil(Fraction(ratio) * 100)
    truth = set(sorted(range(100), key=lambda j: -logits[j])[:least])
    selected = one_query(logits, [3] * 100, device, 0.5, float(ratio), backend)
    assert {j for j, s in enumerate(selected) if s} == truth


def test_sizes_weigh(backend, device):
    """Equal scores: mass is in proportion to size. 60 + 25 of 100 reach 0.8, 60 alone does not."""
    assert one_query([0.0] * 4, [5, 60, 10, 25], device, 0.8, 0.0, backend) == [False, True, False, True]
    assert one_query([0.0] * 4, [5, 60, 10, 25], device, 0.59, 0.0, backend) == [False, True, False, False]


@pytest.mark.parametrize("top_p", [0.3, 0.999, 1.0])
@pytest.mark.parametrize("min_k_ratio", [0.0, 1.0])
def test_empty_clusters_are_never_selected(backend, device, top_p, min_k_ratio):
    """Not even where their centroid fits best."""
    selected = one_query([9.0, 0.0, 9.0, 1.0], [0, 10, 0, 10], device, top_p, min_k_ratio, backend)
    assert not selected[0] and not selected[2] and selected[3]


def test_top_p_of_one_selects_by_rule(backend, device):
    """A cluster whose mass is far below fp32's resolution is selected all the same."""
    assert one_query([0.0, 200.0, 50.0, 0.0], [1, 1, 1, 0], device, 1.0, 0.0, backend) == [True, True, True, False]
    assert one_query([0.0, 200.0, 50.0, 0.0], [1, 1, 1, 0], device, 7.0, 0.0, backend) == [True, True, True, False]


def test_ties_go_to_the_lower_cluster(backend, device):
    """Eight equal masses of 1/8, exact in binary: the mass before the fifth is exactly 0.5, so it stays out."""
    assert one_query([2.0] * 8, [4] * 8, device, 0.5, 0.0, backend) == [True] * 4 + [False] * 4
    assert one_query([2.0] * 8, [4] * 8, device, 0.51, 0.0, backend) == [True] * 5 + [False] * 3


def test_huge_logits(backend, device):
    """Scores whose exp overflows fp32, up and down."""
    assert one_query([1e4, -1e4, 1e4 - 1], [1, 50, 1], device, 0.7, 0.0, backend) == [True, False, False]
    assert one_query([-1e5, -1e4, -1e4 - 1], [1, 1, 1], device, 0.8, 0.0, backend) == [False, True, True]


def test_minimum_among_vanishing_masses(backend, device):
    """Masses that underflow to zero still rank by their scores, and before empty clusters."""
    selected = one_query([0.0, 0.0, -9.0, 300.0, 5.0, 7.0], [0, 3, 3, 3, 3, 0], device, 0.5, 0.5, backend)
    assert selected == [False, True, False, True, True, False]


def test_one_row_and_one_column(backend, device):
    assert one_query([3.0], [10], device, 0.2, 0.0, backend) == [True]


def test_a_row_does_not_depend_on_its_batch(backend, device):
    g = cases.generator(9)
    q, k = torch.randn(3, 17, 64, generator=g), torch.randn(3, 29, 64, generator=g)
    sizes = torch.randint(0, 9, (3, 29), generator=g).clamp(max=8)
    ones = torch.ones(3, 17, dtype=torch.int64)

    def run(rows):
        return select_by_mass(groups(q[rows], ones[rows], device), groups(k[rows], sizes[rows], device), top_p=0.6,
                         min_k_ratio=0.1, scale=0.125, backend=backend)  # fmt: skip

    together = run(slice(None))
    assert together.shape == (3, 1, 17, 29) and together.dtype == torch.bool
    for i in range(3):
        assert torch.equal(run(slice(i, i + 1))[0], together[i])


@pytest.mark.parametrize(
    ("top_p", "min_k_ratio", "named"),
    [(0.0, 0.1, "top_p"), (-1.0, 0.1, "top_p"), (math.nan, 0.1, "top_p"), (0.5, -0.1, "min_k_ratio"),
     (0.5, 1.1, "min_k_ratio"), (0.5, math.nan, "min_k_ratio")],
)  # fmt: skip
def test_bad_input_is_named(backend, device, top_p, min_k_ratio, named):
    with pytest.raises(ValueError, match=named):
        one_query([0.0, 1.0], [1, 1], device, top_p, min_k_ratio, backend)
