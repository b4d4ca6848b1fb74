"""Moments against fp64, cluster by cluster, on ragged partitions."""

import brute_force
import cases
import pytest
import torch
from accuracy import errors
from svg2_pack.svg2_core.ops.moments import moments

B, H, N, C_Q, C_K = 2, 2, 230, 7, 19
NAMES = ("values", "log_mass", "variance", "spread")


def made(seed, d=64, factor=1.0, dtype=torch.float32, memory="bhnd", c_k=C_K):
    g = cases.generator(seed)
    kinds = memory, memory, "bnhd"  # values lie otherwise than keys
    q, k, v = (cases.MEMORY[kind]((factor * x).to(dtype)) for kind, x in zip(kinds, cases.semantic_qkv(g, B, H, N, d), strict=True))
    q_labels, k_labels = (cases.ragged_labels(g, B, H, N, c) for c in (C_Q, c_k))
    return q, k, v, q_labels, k_labels


def error_of(name, found, truth) -> float:
    """Relative L2 error; of a logarithm, which may be all near zero, against one."""
    return (found - truth).abs().max().item() / max(1, truth.abs().max().item()) if name == "log_mass" else errors(found, truth)[0]


def run(q, k, v, q_labels, k_labels, scale, directions=8, c_k=C_K):
    groups = cases.clusters_of(q_labels, C_Q, q), cases.clusters_of(k_labels, c_k, k)
    return moments(q, k, v, *groups, scale=scale, directions=directions)


@pytest.mark.parametrize("factor", [0.2, 1.0, 6.0], ids=["flat", "usual", "sharp"])
@pytest.mark.parametrize("memory", ["bhnd", "packed"])
def test_each_is_what_it_says(factor, memory):
    case = made(1, factor=factor, memory=memory)
    found = run(*case, scale=0.125)
    for i in range(B):
        for j in range(H):
            expected = brute_force.moments(*(x[i, j] for x in case), C_Q, C_K, 0.125)
            for name, truth in zip(NAMES, expected, strict=True):
                error = error_of(name, getattr(found, name)[i, j], truth)
                assert error <= 3e-6, (name, error)


def test_mass_far_past_the_range_of_exp():
    """Logits of hundreds within a cluster: exp alone would overflow."""
    case = made(2, factor=30.0)
    found = run(*case, scale=0.125)
    truth = brute_force.moments(*(x[0, 0] for x in case), C_Q, C_K, 0.125)[1]
    assert truth.max() > 200
    assert errors(found.log_mass[0, 0], truth)[0] <= 1e-5


def test_mass_is_at_least_that_of_the_centroid():
    """Jensen: a cluster weighs no less than as many keys at its centroid; one of a single token just that."""
    q, k, v, q_labels, k_labels = made(3)
    found = run(q, k, v, q_labels, k_labels, scale=0.125)
    assert found.log_mass.min() >= -1e-6
    single = torch.stack([torch.bincount(row, minlength=C_K) == 1 for row in k_labels.flatten(0, 1)]).view(B, H, C_K)
    assert single.any()
    assert found.log_mass.transpose(2, 3)[single].abs().max() <= 1e-6
    assert found.spread[single].abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_in_16_bits_they_are_those_of_the_rounded_inputs(dtype, default_backend):
    """Tensor cores take the keys' deviations and the query centroids in 16 bits; sums are fp32 everywhere."""
    bound = 3e-6 if default_backend != "triton" else 2 * torch.finfo(torch.bfloat16).eps
    case = made(4, dtype=dtype)
    found = run(*case, scale=0.125)
    expected = brute_force.moments(*(x[1, 1] for x in case), C_Q, C_K, 0.125)
    for name, truth in zip(NAMES, expected, strict=True):
        assert error_of(name, getattr(found, name)[1, 1], truth) <= bound, name


def test_directions_catch_the_variance_of_logits_within_clusters():
    """With all directions: for any query, the sum over them is the variance of its logits in each cluster on average."""
    q, k, v, q_labels, k_labels = made(5, d=32)
    found = run(q, k, v, q_labels, k_labels, scale=0.2, directions=32)
    features = (q[0, 0].double() @ found.directions[0, 0].double()).square()
    truth, sums = torch.zeros(C_K, dtype=torch.float64), torch.zeros(C_K, dtype=torch.float64)
    for j in k_labels[0, 0].unique().tolist():
        ks = k[0, 0][k_labels[0, 0] == j].double()
        truth[j] = (0.2 * (ks - ks.mean(0)) @ q[0, 0].double().T).square().mean()
        sums[j] = (features @ found.direction_variances[0, 0, j].double()).mean()
    sizes = torch.bincount(k_labels[0, 0], minlength=C_K)
    total = (truth * sizes).sum()
    assert ((sums * sizes).sum() / total).item() == pytest.approx(1, abs=0.02)
    few = run(q, k, v, q_labels, k_labels, scale=0.2, directions=8)
    caught = ((q[0, 0] @ few.directions[0, 0]).square() @ few.direction_variances[0, 0].T).double().mean(0)
    # The best 8 of 32, by the exact eigenvectors.
    dk = torch.cat([k[0, 0][k_labels[0, 0] == j].double() - k[0, 0][k_labels[0, 0] == j].double().mean(0) for j in k_labels[0, 0].unique().tolist()])
    second = q[0, 0].double().T @ q[0, 0].double() / N
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    best = torch.linalg.eigvalsh(root @ (dk.T @ dk / N) @ root)[-8:].sum() * 0.2**2
    assert (caught * sizes).sum() / N >= 0.95 * best


@pytest.mark.parametrize("directions", [0, 1, 64])
def test_any_number_of_directions(directions):
    found = run(*made(6), scale=0.125, directions=directions)
    assert found.directions.shape == (B, H, 64, directions) and found.direction_variances.shape == (B, H, C_K, directions)
    assert found.directions.isfinite().all() and (found.direction_variances >= 0).all()


def test_clusters_without_extent(default_backend):
    """Constant keys, and as many clusters as tokens: no variance anywhere, and nothing that is not a number."""
    q, k, v, q_labels, k_labels = made(7)
    found = run(q, torch.ones_like(k), v, q_labels, k_labels, scale=0.125)
    assert all(x.isfinite().all() for x in found)
    assert found.log_mass.abs().max() <= 1e-5 and found.variance.abs().max() <= 1e-5
    some = slice(cases.sized(default_backend, B, 1)), slice(None), slice(None)
    q, k, v, q_labels, own = (x[some] for x in (q, k, v, q_labels, torch.arange(N).expand(B, H, N)))
    found = run(q, k, v, q_labels, own, scale=0.125, c_k=N)
    assert all(x.isfinite().all() for x in found) and found.spread.abs().max() == 0
    assert torch.equal(found.values, v)


def test_a_head_is_its_own_business():
    case = made(8)
    whole = run(*case, scale=0.125)
    for i in range(B):
        for j in range(H):
            alone = [x[i : i + 1, j : j + 1] for x in case]
            groups = cases.clusters_of(alone[3], C_Q, alone[0]), cases.clusters_of(alone[4], C_K, alone[1])
            found = moments(*alone[:3], *groups, scale=0.125, directions=8)
            assert all(torch.equal(a[0, 0], b[i, j]) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"v": lambda v: v[:, :1]}, "v"), ({"k": lambda k: k[:, :, 1:]}, "k"), ({"directions": lambda _: 65}, "directions"),
     ({"directions": lambda _: -1}, "directions"), ({"q_clusters": lambda c: c._replace(order=c.order[..., 1:])}, "q_clusters"),
     ({"k_clusters": lambda c: c._replace(centroids=c.centroids[..., 1:])}, "k_clusters")],
    ids=["v", "k", "directions", "negative", "q_clusters", "k_clusters"],
)  # fmt: skip
def test_bad_input_is_named(change, named):
    q, k, v, q_labels, k_labels = made(9)
    good = {"q": q, "k": k, "v": v, "q_clusters": cases.clusters_of(q_labels, C_Q, q),
            "k_clusters": cases.clusters_of(k_labels, C_K, k), "directions": 4}  # fmt: skip
    with pytest.raises(ValueError, match=rf"moments: .*\b{named}\b"):
        moments(**{**good, **{name: edit(good[name]) for name, edit in change.items()}}, scale=0.125)
