"""svg2_attention with the far field of first order, as a whole: what it gains, what may happen to its inputs, what it carries on."""

from dataclasses import replace

import cases
import pytest
import torch
import torch.nn.functional as F
from accuracy import errors
from svg2_pack.svg2_core import Layout, SVG2Config, svg2_attention
from svg2_pack.svg2_core.metrics import rel_l2

N = 600
CONFIG = SVG2Config(density=0.1, q_clusters=20, k_clusters=40, kmeans_init_iters=4, kmeans_iters=1)


def qkv(seed, b=1, h=2, n=N, d=64, dtype=torch.float32):
    return [x.to(dtype) for x in cases.semantic_qkv(cases.generator(seed), b, h, n, d)]


def spread_out(seed, h=2, n=N, d=64):
    """Without topics: attention spread over directions that fall off, and values that follow the keys with noise of their own."""
    g = cases.generator(seed)
    fall = 3.5 * 0.93 ** torch.arange(d)
    q, k = torch.randn(2, 1, h, n, d, generator=g) * fall
    mix = torch.randn(h, d, d, generator=g) / d**0.5
    return q, k, k @ mix + torch.randn(1, h, n, d, generator=g)


def dense(q, k, v):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


def run(q, k, v, config=CONFIG, warm=None, video=None, **kwargs):
    return svg2_attention(q, k, v, Layout(*(video or (0, q.shape[2]))), config, warm, **kwargs)


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.3])
def test_each_order_is_nearer_to_dense(density):
    q, k, v = spread_out(1)
    found = [
        rel_l2(run(q, k, v, replace(CONFIG, density=density, compensation=c)).out, dense(q, k, v))
        for c in ("off", "centroid", "first_order")
    ]
    assert found[2] < 0.9 * found[1] and found[1] < found[0], found
    assert found[0] > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bits_add_no_more_than_their_rounding(dtype):
    q, k, v = qkv(2, dtype=dtype)
    ours, torchs, truth = run(q, k, v).out, F.scaled_dot_product_attention(q, k, v), dense(q, k, v)
    in_fp32 = run(*(x.float() for x in (q, k, v))).out
    assert rel_l2(ours, in_fp32) <= 2 * rel_l2(torchs, truth) + torch.finfo(dtype).eps
    assert ours.dtype == dtype


def test_density_is_of_pairs_of_video_tokens_and_text_comes_on_top():
    q, k, v = qkv(3, n=N)
    result = run(q, k, v, video=(100, 480))
    text = (N**2 - 480**2) / N**2
    assert result.text_share == pytest.approx(text)
    video = (result.density.item() - text) * N**2 / 480**2
    assert 0.09 < video <= 0.1


def test_dropped_means_dropped(default_backend):
    """With one-hot values the result is the attention matrix itself: without compensation, no weight but on the pairs counted,
    and each query has some."""
    n, h, c_q, c_k, iterations = cases.sized(default_backend, (128, 2, 10, 20, 4), (128, 1, 5, 12, 1))
    q, k, _ = qkv(17, h=h, n=n, d=n)
    one_hot = torch.eye(n).expand(1, h, n, n)
    config = replace(CONFIG, q_clusters=c_q, k_clusters=c_k, density=0.2, compensation="off", kmeans_init_iters=iterations)
    result = run(0.3 * q, 0.3 * k, one_hot, config, video=(8, 110))
    assert (result.out > 0).double().mean().item() == pytest.approx(result.density.item(), abs=1e-6)
    assert torch.allclose(result.out.sum(-1), torch.ones(1, h, n), atol=1e-5)
    represented = run(0.3 * q, 0.3 * k, one_hot, replace(config, compensation="centroid"), video=(8, 110))
    assert (represented.out != 0).double().mean() > 0.9


def test_the_error_it_reports_is_its_error():
    """On 32 rows a head: within a third of the error over all rows, whatever the settings."""
    q, k, v = qkv(4, h=6)
    for config in (CONFIG, replace(CONFIG, compensation="centroid"), replace(CONFIG, density=None, top_p=0.5, compensation="off")):
        result = run(q, k, v, config)
        assert result.error.item() == pytest.approx(rel_l2(result.out, dense(q, k, v)), rel=0.35)
        assert result.error.dim() == 0 and (result.expected_error is None) == (config.density is None)
    assert run(q, k, v, replace(CONFIG, density=1.0)).error.item() <= 1e-6


def test_expected_error_falls_with_density():
    q, k, v = qkv(5)
    expected = [run(q, k, v, replace(CONFIG, density=d)).expected_error.item() for d in (0.02, 0.1, 0.3, 0.8)]
    assert expected == sorted(expected, reverse=True) and expected[-1] < 0.3 * expected[0]


# What may happen to the inputs.


def spoiled(x, value, head=0):
    x = x.clone()
    x[0, head, 7] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 3e38], ids=["nan", "inf", "-inf", "1e30", "3e38"])
@pytest.mark.parametrize("which", ["q", "k", "v", "all"])
def test_a_token_that_is_no_number(value, which):
    """As with dense attention the rows concerned may be no numbers; other heads and the next step are as if nothing were."""
    q, k, v = qkv(6)
    broken = [spoiled(x, value) if which in (name, "all") else x for name, x in zip("qkv", (q, k, v), strict=True)]
    clean, first = run(q, k, v), run(*broken)
    assert torch.equal(first.out[:, 1], clean.out[:, 1])
    second = run(*broken, warm=first.centroids)
    for past in (*first.centroids, *second.centroids):
        assert all(x.isfinite().all() for x in (past.q, past.k, past.q_projection, past.k_projection))
    assert run(q, k, v, warm=second.centroids).out.isfinite().all(), "the next step with sound inputs is sound"
    if which == "q":
        others = [i for i in range(N) if i != 7]
        assert first.out[0, 0, others].isfinite().all()
        if value != value:
            assert first.out[0, 0, 7].isnan().all()


def test_all_is_no_number(default_backend):
    n, clusters = cases.sized(default_backend, (N, {}), (140, {"q_clusters": 3, "k_clusters": 5, "kmeans_init_iters": 2}))
    q, k, v = (torch.full((1, 1, n, 64), torch.nan) for _ in "qkv")
    assert run(q, k, v, replace(CONFIG, **clusters)).out.isnan().all()


@pytest.mark.parametrize("what", ["keys", "queries", "values", "everything"])
def test_constant_inputs(what):
    q, k, v = qkv(7)
    edit = {"keys": (q, k[:, :, :1].expand_as(k), v), "queries": (q[:, :, :1].expand_as(q), k, v),
            "values": (q, k, v[:, :, :1].expand_as(v)), "everything": [x[:, :, :1].expand_as(x) for x in (q, k, v)]}[what]  # fmt: skip
    first = run(*edit)
    second = run(*edit, warm=first.centroids)
    for result in (first, second):
        assert result.out.isfinite().all()
        if what != "queries":
            assert errors(result.out, dense(*edit))[0] <= 1e-4


@pytest.mark.parametrize("n", [2, 5, 20, 33])
def test_fewer_tokens_than_directions(default_backend, n):
    h, iterations = cases.sized(default_backend, (2, 4), (1, 1))
    q, k, v = qkv(8, h=h, n=n)
    counts = min(4, n)
    config = replace(CONFIG, q_clusters=counts, k_clusters=counts, kmeans_init_iters=iterations)
    first = run(q, k, v, config)
    assert first.out.isfinite().all() and run(q, k, v, config, first.centroids).out.isfinite().all()
    every = replace(config, q_clusters=n, k_clusters=n, density=1e-9)
    assert errors(run(q, k, v, every).out, dense(q, k, v))[0] <= 1e-4, "each token its own cluster: nothing is lost"


@pytest.mark.parametrize("d", [8, 32, 80, 128])
def test_head_dimensions_of_any_size(d):
    """Below 32, the metric and the variances have fewer directions."""
    q, k, v = qkv(9, d=d)
    assert rel_l2(run(q, k, v).out, dense(q, k, v)) < rel_l2(run(q, k, v, replace(CONFIG, compensation="centroid")).out, dense(q, k, v))


def test_a_common_offset_of_the_keys_changes_nothing():
    """Softmax does not see it; fp32 loses the digits that it takes up."""
    q, k, v = qkv(10)
    offset = 30 * torch.randn(64, generator=cases.generator(11))
    assert rel_l2(run(q, k + offset, v).out, run(q, k, v).out) <= 0.02


def test_outlier_channels_in_queries_and_keys():
    """Four channels eight times as large on both sides: clusters in the metric still gain, and first order still helps."""
    q, k, v = qkv(12)
    scale = torch.ones(64).index_fill(0, torch.tensor([3, 20, 41, 60]), 8.0)
    q, k = q * scale.sqrt(), k * scale
    truth = dense(q, k, v)
    centroid, first = (rel_l2(run(q, k, v, replace(CONFIG, compensation=c)).out, truth) for c in ("centroid", "first_order"))
    assert first < centroid


# What it carries on.


def test_repeats_are_the_same_bits():
    q, k, v = qkv(13)
    a, b = run(q, k, v), run(q.clone(), k.clone(), v.clone())
    assert torch.equal(a.out, b.out) and torch.equal(a.error, b.error) and torch.equal(a.expected_error, b.expected_error)
    warm = [run(q * 1.01, k, v, warm=x.centroids) for x in (a, b)]
    assert torch.equal(warm[0].out, warm[1].out)


def test_a_warm_call_goes_on_where_the_last_one_stopped():
    """One iteration a call, from the past: after a few calls as near to dense as many iterations at once, and nearer than one."""
    q, k, v = torch.randn(3, 1, 2, N, 32, generator=cases.generator(14))  # no topics: k-means needs its iterations
    config = replace(CONFIG, kmeans_init_iters=1, kmeans_iters=1)

    def inertia(result):
        sizes = [offsets for offsets, _ in result.groups.offsets]
        assert sizes[0].shape[-1] == 21
        return result.error.item()

    first = run(q, k, v, config)
    later = first
    for _ in range(8):
        later = run(q, k, v, config, later.centroids)
    many = run(q, k, v, replace(config, kmeans_init_iters=9))
    found = [rel_l2(x.out, dense(q, k, v)) for x in (first, later, many)]
    assert inertia(later) > 0
    assert found[1] < found[0] and found[1] == pytest.approx(found[2], rel=0.05)


def test_the_past_of_one_way_to_cluster_is_a_cold_start_for_another():
    q, k, v = qkv(15)
    euclidean = replace(CONFIG, metric_directions=0)
    for config, other in ((CONFIG, euclidean), (euclidean, CONFIG), (CONFIG, replace(CONFIG, metric_directions=16))):
        past = run(q, k, v, other).centroids
        assert torch.equal(run(q, k, v, config, past).out, run(q, k, v, config).out)


def test_heads_in_chunks_and_rows_alone_are_the_same_bits(default_backend):
    h, c_q, c_k, iterations, chunks = cases.sized(default_backend, (3, 9, 21, 4, (1, 2)), (2, 3, 7, 1, (1,)))
    q, k, v = qkv(16, b=2, h=h, n=210)
    config = replace(CONFIG, q_clusters=c_q, k_clusters=c_k, kmeans_init_iters=iterations)
    whole = run(q, k, v, config, video=(11, 160))
    for heads in chunks:
        parts = run(q, k, v, config, video=(11, 160), heads_at_a_time=heads)
        assert torch.equal(parts.out, whole.out) and torch.equal(parts.density, whole.density)
        assert torch.equal(parts.error, whole.error)
    for i in range(2):
        row = slice(i, i + 1)
        assert torch.equal(run(q[row], k[row], v[row], config, video=(11, 160)).out[0], whole.out[i])


def test_a_device_without_fp64_is_served_as_well(monkeypatch):
    """Its small matrices are taken to the CPU, its counts are fp32."""
    tokens = spread_out(50)
    expected = run(*tokens)
    monkeypatch.setattr("svg2_pack.svg2_core.precision._WITHOUT_FP64", {"cpu"})
    made = run(*tokens)
    assert made.density.item() == pytest.approx(expected.density.item(), rel=0.02)
    assert made.error.item() == pytest.approx(expected.error.item(), rel=0.1)
