"""kmeans judged by what a partition must be: self-consistent, no worse than fp64, and a row's own business."""

from itertools import pairwise

import brute_force
import cases
import pytest
import torch
from svg2_pack.svg2_core.ops.kmeans import cluster_means, kmeans

# Every kind of memory q and k may come in; k-means reads the same views.
MEMORY = list(cases.MEMORY)


def blobs(seed, b, h, n, d, device, dtype, offset=0.0, memory="bhnd"):
    """Tokens around 20 centres, `offset` away from the origin."""
    g = cases.generator(seed)
    centres = torch.randn(b, h, 20, d, generator=g)
    topic = torch.randint(20, (b, h, n, 1), generator=g).expand(b, h, n, d)
    x = centres.gather(2, topic) + 0.5 * torch.randn(b, h, n, d, generator=g) + offset
    return cases.MEMORY[memory](x.to(device, dtype))


def mean_tolerance(members: torch.Tensor) -> float:
    """Error allowed to the mean of `members` `[n, D]`: fp32 roundings that do not all go the same way."""
    return torch.finfo(torch.float32).eps * (4 + 2 * len(members) ** 0.5) * members.double().abs().max().item()


def assert_means(x, labels, centroids, kept=None):
    """`centroids` `[C, D]` are the means of their members; an empty one is `kept`'s."""
    assert centroids.dtype == torch.float32
    for c in range(len(centroids)):
        members = x[labels == c]
        if len(members):
            error = (centroids[c].double() - members.double().mean(0)).abs().max().item()
            assert error <= mean_tolerance(members), f"cluster {c} of {len(members)}: {error:.2e}"
        elif kept is not None:
            assert torch.equal(centroids[c], kept[c]), f"empty cluster {c} moved"


def assert_nearest(x, labels, centroids):
    """No token is nearer to another centroid than to its own, up to rounding the centroids to x's dtype and fp32 sums."""
    distances = brute_force.squared_distances(x, centroids)
    own = distances.gather(1, labels[:, None])[:, 0]
    best, nearest = distances.min(1)
    norms = centroids.double().norm(dim=-1)
    rounding = torch.finfo(x.dtype).eps / 2 * (norms[labels] + norms[nearest])
    sums = torch.finfo(torch.float32).eps * 8 * (x.double().norm(dim=-1) + norms.max()) * norms.max()
    assert (own <= (best.sqrt() + rounding) ** 2 + sums).all()
    # Rounding decides near ties only: nearly every label is the nearest's.
    assert (labels == nearest).double().mean() > (0.99 if x.dtype == torch.float32 else 0.9)


def test_contract(backend, dtype, device):
    """order is a permutation, ascending within clusters; offsets bound it; types and shapes are as promised."""
    b, h, n, d, c = 2, 3, 257, 80, 19
    clusters = kmeans(blobs(1, b, h, n, d, device, dtype, memory="packed"), c, iterations=3, backend=backend)
    assert clusters.order.dtype == clusters.offsets.dtype == torch.int32
    assert clusters.centroids.dtype == torch.float32
    assert clusters.order.shape == (b, h, n)
    assert clusters.offsets.shape == (b, h, c + 1)
    assert clusters.centroids.shape == (b, h, c, d)
    for order, offsets, sizes in zip(
        clusters.order.flatten(0, 1), clusters.offsets.flatten(0, 1), clusters.sizes.flatten(0, 1), strict=True
    ):
        order, offsets = order.tolist(), offsets.tolist()
        assert sorted(order) == list(range(n))
        assert offsets[0] == 0 and offsets[-1] == n and offsets == sorted(offsets)
        for start, stop in pairwise(offsets):
            assert order[start:stop] == sorted(order[start:stop])
        assert sizes.tolist() == [stop - start for start, stop in pairwise(offsets)]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("iterations", [1, 4])
def test_labels_and_centroids_are_of_one_assignment(backend, dtype, device, iterations, memory):
    """Labels are nearest to the centroids of the round before, centroids are the means of these very labels."""
    iterations = cases.sized(backend, iterations, min(iterations, 2))
    x = blobs(2, 2, 2, 300, 64, device, dtype, memory=memory)
    init = x[:, :, 5:300:13].float()
    now = kmeans(x, init.shape[2], iterations=iterations, init=init, backend=backend)
    before = init
    if iterations > 1:
        before = kmeans(x, init.shape[2], iterations=iterations - 1, init=init, backend=backend).centroids
    labels = cases.labels_of(now)
    for i in range(2):
        for j in range(2):
            assert_nearest(x[i, j], labels[i, j], before[i, j])
            assert_means(x[i, j], labels[i, j], now.centroids[i, j], kept=before[i, j])


@pytest.mark.parametrize("d", [64, 80, 96, 128])
def test_head_dims(backend, device, d):
    x = blobs(3, 1, 2, 150, d, device, torch.float32)
    init = x[:, :, ::10].float()
    labels = cases.labels_of(kmeans(x, 15, iterations=1, init=init, backend=backend))
    for j in range(2):
        assert_nearest(x[0, j], labels[0, j], init[0, j])


@pytest.mark.parametrize("offset", [0.0, 16.0, 256.0])
def test_assignment_far_from_the_origin(backend, dtype, device, offset):
    """Tokens share an offset (some channels of real keys do): the cancelling products must not blur who is nearest."""
    x = blobs(4, 1, 1, 700, 64, device, dtype, offset=offset)
    init = (x[:, :, :690:23].float() + x[:, :, 1:690:23].float()) / 2
    labels = cases.labels_of(kmeans(x, 30, iterations=1, init=init, backend=backend))[0, 0]
    distances = brute_force.squared_distances(x[0, 0], init[0, 0])
    own, best = distances.gather(1, labels[:, None]).sum(), distances.min(1).values.sum()
    assert own <= 1.002 * best


@pytest.mark.parametrize("offset", [0.0, 16.0])
def test_no_worse_than_fp64(backend, dtype, device, offset):
    """From the same seeds, the inertia a plain fp64 k-means reaches."""
    x = blobs(4, 1, 2, 700, 64, device, dtype, offset=offset)
    init = x[:, :, :690:23].float()
    clusters = kmeans(x, 30, iterations=5, init=init, backend=backend)
    labels = cases.labels_of(clusters)
    for j in range(2):
        ours = brute_force.inertia(x[0, j], labels[0, j], clusters.centroids[0, j])
        truth = brute_force.inertia(x[0, j], *brute_force.lloyd(x[0, j], init[0, j], 5))
        assert ours <= 1.01 * truth


def test_inertia_falls_with_iterations(backend, dtype, device):
    x = blobs(5, 1, 1, 500, 64, device, dtype)
    inertias = []
    for iterations in (1, 2, 3, 5, 8, 13):
        clusters = kmeans(x, 25, iterations=iterations, seed=1, backend=backend)
        inertias.append(brute_force.inertia(x[0, 0], cases.labels_of(clusters)[0, 0], clusters.centroids[0, 0]))
    # Assignment in half precision may undo a rounding's worth.
    slack = 1 + (1e-6 if dtype == torch.float32 else 1e-3)
    assert all(later <= earlier * slack for earlier, later in pairwise(inertias))
    assert inertias[-1] < 0.97 * inertias[0]


def test_empty_clusters_keep_their_centroid(backend, dtype, device):
    x = blobs(6, 1, 2, 90, 64, device, dtype)
    init = x[:, :, :10].float().clone()
    init[0, 0, 3] = 60000.0  # nowhere near any token
    init[0, 1, 0] = -123.0
    clusters = kmeans(x, 10, iterations=3, init=init, backend=backend)
    assert clusters.sizes[0, 0, 3] == 0 and clusters.sizes[0, 1, 0] == 0
    assert torch.equal(clusters.centroids[0, 0, 3], init[0, 0, 3])
    assert torch.equal(clusters.centroids[0, 1, 0], init[0, 1, 0])
    assert clusters.centroids.isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 97])
def test_one_cluster(backend, dtype, device, n):
    x = blobs(7, 1, 1, n, 64, device, dtype)
    clusters = kmeans(x, 1, iterations=2, backend=backend)
    assert clusters.order[0, 0].tolist() == list(range(n))
    assert clusters.offsets[0, 0].tolist() == [0, n]
    assert_means(x[0, 0], torch.zeros(n, dtype=torch.int64, device=device), clusters.centroids[0, 0])


@pytest.mark.parametrize("n", [1, 2, 97])
def test_as_many_clusters_as_tokens(backend, dtype, device, n):
    """Every token is its own centroid."""
    x = blobs(8, 1, 2, n, 64, device, dtype)
    clusters = kmeans(x, n, iterations=2, backend=backend)
    assert (clusters.sizes == 1).all()
    of_each_token = cases.labels_of(clusters)[..., None].expand(1, 2, n, 64)
    assert torch.equal(clusters.centroids.gather(2, of_each_token), x.float())


@pytest.mark.parametrize("value", [0.0, 0.1, -300.0])
def test_all_tokens_equal(backend, dtype, device, value):
    """One place for everything: all tokens go to one cluster, and its mean is that place."""
    x = torch.full((1, 1, 2000, 64), value).to(device, dtype)
    clusters = kmeans(x, 9, iterations=3, backend=backend)
    assert sorted(clusters.sizes[0, 0].tolist()) == [0] * 8 + [2000]
    assert sorted(clusters.order[0, 0].tolist()) == list(range(2000))
    assert_means(x[0, 0], cases.labels_of(clusters)[0, 0], clusters.centroids[0, 0])
    # Empty clusters too: they were seeded there, or held all tokens in an earlier round.
    assert (clusters.centroids.double() - x[0, 0, 0].double()).abs().max() <= mean_tolerance(x[0, 0])


def test_repeated_tokens(backend, device):
    """Five distinct places, 40 tokens each: a partition never splits a place."""
    g = cases.generator(9)
    place = torch.randint(5, (200,), generator=g)
    x = (torch.randn(5, 64, generator=g)[place])[None, None].to(device)
    labels = cases.labels_of(kmeans(x, 12, iterations=4, backend=backend))[0, 0].cpu()
    assert all(len(labels[place == p].unique()) == 1 for p in range(5))


@pytest.mark.parametrize("n", [3000, 40000])
def test_means_of_huge_clusters(backend, device, n):
    """A sum of many values of one sign: added one by one in fp32, every rounding goes the same way."""
    g = cases.generator(10)
    x = (0.1 + 1e-4 * torch.rand(1, 1, n, 16, generator=g)).to(device)
    clusters = kmeans(x, 1, iterations=1, backend=backend)
    assert_means(x[0, 0], torch.zeros(n, dtype=torch.int64, device=device), clusters.centroids[0, 0])


# Cold start


@pytest.mark.parametrize(("n", "c"), [(5, 5), (100, 99), (100, 51), (257, 20), (1000, 7), (64, 1)])
def test_cold_start_takes_distinct_tokens(backend, device, n, c):
    """Distinct tokens have no nearer seed than themselves: from distinct seeds no cluster comes out empty."""
    x = torch.randn(1, 4, n, 64, generator=cases.generator(11)).to(device)
    for seed in range(3):
        assert (kmeans(x, c, iterations=1, seed=seed, backend=backend).sizes > 0).all()


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_cold_start_is_deterministic(backend, dtype, device):
    x = blobs(12, 1, 2, 200, 64, device, dtype)
    torch.manual_seed(1)
    first = kmeans(x, 20, iterations=2, backend=backend)
    torch.manual_seed(2)
    assert same(first, kmeans(x, 20, iterations=2, backend=backend))


def test_cold_start_differs_by_seed_role_and_head(backend, device):
    x = blobs(13, 1, 1, 400, 64, device, torch.float32).expand(1, 6, 400, 64)
    runs = [
        kmeans(x, 20, iterations=1, seed=seed, role=role, backend=backend).centroids[0]
        for seed, role in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    starts = torch.cat(runs)  # 4 runs x 6 heads over the same tokens
    assert len({tuple(start.flatten().tolist()) for start in starts}) == 24


def test_heads_in_chunks_start_as_together(backend, dtype, device):
    x = blobs(14, 2, 5, 200, 64, device, dtype, memory="bnhd")
    whole = kmeans(x, 20, iterations=2, seed=3, role=1, backend=backend)
    for heads in (slice(0, 2), slice(2, 5)):
        part = kmeans(x[:, heads], 20, iterations=2, seed=3, role=1, first_head=heads.start, backend=backend)
        assert same(part, (t[:, heads] for t in whole))


@pytest.mark.parametrize("seed", [-1, 2**31, 2**32, 2**63, 2**64 - 1])
def test_any_seed(backend, device, seed):
    """ComfyUI's seeds go up to 2**64 - 1."""
    x = blobs(15, 1, 1, 100, 64, device, torch.float32)
    assert (kmeans(x, 10, iterations=1, seed=seed, backend=backend).sizes > 0).all()


def test_the_same_tokens_start_anywhere(backend, device):
    """Seeds are spread over the whole sequence, not drawn from its beginning."""
    x = torch.arange(1000.0, device=device)[None, None, :, None].expand(1, 1, 1000, 64)
    largest = kmeans(x, 10, iterations=1, backend=backend).sizes.max()
    assert largest <= 200  # each of 10 equal stretches has a seed, so no token is more than 100 from one


# Warm start


def test_warm_start_goes_on(backend, device):
    """Two rounds, then three from where they ended, are five rounds."""
    x = blobs(16, 2, 2, 300, 64, device, torch.float32)
    start = kmeans(x, 20, iterations=2, backend=backend)
    assert same(
        kmeans(x, 20, iterations=3, init=start.centroids, backend=backend),
        kmeans(x, 20, iterations=5, backend=backend),
    )


def test_warm_start_leaves_init_alone(backend, device):
    x = blobs(17, 1, 1, 100, 64, device, torch.float32)
    init = x[:, :, :10].clone()
    before = init.clone()
    kmeans(x, 10, iterations=3, init=init, backend=backend)
    assert torch.equal(init, before)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_a_row_does_not_depend_on_its_batch(backend, dtype, device, cold):
    x = blobs(18, 3, 2, 173, 80, device, dtype, memory="packed")
    init = None if cold else x[:, :, :165:15].float()
    together = kmeans(x, 11, iterations=3, init=init, backend=backend)
    for i in range(3):
        row = slice(i, i + 1)
        alone = kmeans(x[row], 11, iterations=3, init=None if cold else init[row], backend=backend)
        assert same(alone, (t[row] for t in together))


# cluster_means


@pytest.mark.parametrize("memory", MEMORY)
def test_cluster_means(backend, dtype, device, memory):
    """fp32 means of any values over ragged clusters; an empty cluster's are zeros."""
    g = cases.generator(19)
    labels = cases.ragged_labels(g, 2, 3, 211, 13).to(device)
    values = cases.MEMORY[memory](torch.randn(2, 3, 211, 96, generator=g).to(device, dtype))
    result = cluster_means(values, cases.clusters_of(labels, 13), backend=backend)
    assert result.shape == (2, 3, 13, 96)
    for i in range(2):
        for j in range(3):
            assert_means(values[i, j], labels[i, j], result[i, j], kept=torch.zeros(13, 96, device=device))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"x": torch.zeros(2, 8, 4)}, "x"),
        ({"n_clusters": 9}, "9 clusters for 8 tokens"),
        ({"n_clusters": 0}, "0 clusters"),
        ({"iterations": 0}, "iterations"),
        ({"init": torch.zeros(1, 1, 4, 4)}, "init"),
        ({"init": torch.zeros(1, 1, 3, 5)}, "init"),
    ],
)
def test_bad_input_is_named(backend, arguments, named):
    good = {"x": torch.randn(1, 1, 8, 4), "n_clusters": 3, "iterations": 1, "init": None}
    kmeans(**good, backend=backend)
    with pytest.raises(ValueError, match=named):
        kmeans(**{**good, **arguments}, backend=backend)


def test_cluster_means_of_other_tokens(backend):
    clusters = kmeans(torch.randn(1, 1, 8, 4), 3, iterations=1, backend=backend)
    with pytest.raises(ValueError, match="values"):
        cluster_means(torch.zeros(1, 1, 9, 4), clusters, backend=backend)
