"""svg2_attention as a whole: dense in the limit, honest about its density, indifferent to how a call is cut."""

from dataclasses import replace

import cases
import pytest
import torch
import torch.nn.functional as F
from accuracy import errors
from svg2_pack.svg2_core import Layout, SVG2Config, svg2_attention
from svg2_pack.svg2_core.cache import CentroidCache, Centroids, Key
from svg2_pack.svg2_core.ops.kmeans import kmeans

CONFIG = SVG2Config(top_p=0.6, min_k_ratio=0.05, q_clusters=9, k_clusters=21, kmeans_init_iters=4, kmeans_iters=2)
# In Triton's interpreter. Three query clusters are large enough for high query tiles, and what is left of them takes low ones.
SMALL = replace(CONFIG, q_clusters=3, k_clusters=8, kmeans_init_iters=2)


def of(backend, **settings):
    return replace(cases.sized(backend, CONFIG, SMALL), **settings)


def heads(backend, b=2, h=3, few=(1, 2)):
    """How many rows and heads a call is of."""
    return dict(zip("bh", cases.sized(backend, (b, h), few), strict=True))


def random_qkv(seed, device, dtype=torch.float32, b=2, h=3, n=210, d=64, memory="bnhd"):
    g = cases.generator(seed)
    return [cases.MEMORY[memory](t.to(device, dtype)) for t in cases.semantic_qkv(g, b, h, n, d)]


def same_past(x: Centroids, y: Centroids) -> bool:
    pairs = ((x.q, y.q), (x.k, y.k), (x.q_projection, y.q_projection), (x.k_projection, y.k_projection))
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def same(a, b) -> bool:
    """Two results agree bit for bit."""
    return torch.equal(a.out, b.out) and all(same_past(x, y) for x, y in zip(a.centroids, b.centroids, strict=True))


LAYOUTS = {"video_only": (0, 210), "text_before": (30, 180), "text_after": (0, 171), "text_around": (11, 160)}


@pytest.mark.parametrize("compensation", ["off", "centroid", "first_order"])
@pytest.mark.parametrize("video", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("rule", ["top_p", "density"])
def test_everything_selected_is_dense(backend, dtype, device, video, compensation, rule):
    q, k, v = random_qkv(1, device, dtype, **heads(backend))
    config = of(backend, **{rule: 1.0}, compensation=compensation)
    result = svg2_attention(q, k, v, Layout(*video), config, backend=backend)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torchs = F.scaled_dot_product_attention(q, k, v)
    assert result.out.dtype == dtype
    assert errors(result.out, dense)[0] <= 2 * errors(torchs, dense)[0] + torch.finfo(dtype).eps / 2
    assert result.density.item() == 1.0


def test_top_p_of_one_with_padded_text(backend, device):
    q, k, v = random_qkv(2, device, **heads(backend, few=(2, 1)))
    bias = torch.zeros(2, 50, device=device)
    bias[0, 20:], bias[1, 45:] = -torch.inf, -2.5
    layout = Layout(20, 160, bias)
    mask = torch.zeros(2, 210, dtype=torch.float64, device=device)
    mask[:, :20], mask[:, 180:] = bias[:, :20].double(), bias[:, 20:].double()
    result = svg2_attention(q, k, v, layout, of(backend, top_p=1.0), backend=backend)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask[:, None, None])
    assert errors(result.out, dense)[0] <= 1e-6


@pytest.mark.parametrize("video", [(0, 128), (20, 90)], ids=["video_only", "text_around"])
def test_density_is_the_count_of_pairs(backend, device, video):
    """With one-hot values the result is the attention matrix itself: its non-zero entries are the pairs computed."""
    n = d = 128
    q, k, _ = random_qkv(3, device, n=n, d=d, **heads(backend))
    one_hot = torch.eye(n, device=device).expand(*q.shape[:2], n, d)
    config = of(backend, top_p=0.4, compensation="off")
    result = svg2_attention(q * 0.3, k * 0.3, one_hot, Layout(*video), config, backend=backend)
    counted = (result.out > 0).double().mean().item()
    assert 0.1 < counted < 0.9
    assert result.density.item() == pytest.approx(counted, abs=1e-6)
    assert result.density.dim() == 0 and result.density.dtype == torch.float32


def test_text_is_exact_both_ways(backend, device):
    """Every text query attends to all; every video query attends to all text, at the lowest top_p."""
    n = d = 128
    q, k, _ = random_qkv(4, device, n=n, d=d, **heads(backend))
    one_hot = torch.eye(n, device=device).expand(*q.shape[:2], n, d)
    config = of(backend, top_p=1e-6, min_k_ratio=0.0, compensation="off")
    weights = svg2_attention(q * 0.3, k * 0.3, one_hot, Layout(20, 90), config, backend=backend).out
    text = [*range(20), *range(110, 128)]
    assert (weights[:, :, text] > 0).all()
    assert (weights[..., text] > 0).all()
    assert (weights[:, :, 20:110, 20:110] == 0).double().mean() > 0.7


def test_text_queries_equal_dense(backend, device):
    q, k, v = random_qkv(5, device, **heads(backend))
    result = svg2_attention(q, k, v, Layout(11, 160), of(backend, top_p=0.3), backend=backend)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    text = [*range(11), *range(171, 210)]
    assert errors(result.out[:, :, text], dense[:, :, text])[0] <= 1e-6
    assert errors(result.out, dense)[0] > 1e-3  # the video queries were indeed sparse


def test_error_falls_and_density_rises_with_top_p(backend, device):
    q, k, v = random_qkv(6, device, b=1, h=2, n=600)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for compensation in ("off", "centroid"):
        runs = [
            svg2_attention(q, k, v, Layout(0, 600), replace(CONFIG, q_clusters=20, k_clusters=40, min_k_ratio=0.0,
                           top_p=p, compensation=compensation), backend=backend)
            for p in (0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
        ]  # fmt: skip
        error = [errors(run.out, dense)[0] for run in runs]
        density = [run.density.item() for run in runs]
        assert error == sorted(error, reverse=True) and error[0] > 10 * error[-1]
        assert density == sorted(density) and density[0] < 0.5 * density[-1]


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_compensation_halves_the_error(backend, device, top_p):
    """On data with clusters, a stand-in for what is skipped leaves at most half the error of dropping it."""
    q, k, v = random_qkv(7, device, b=1, h=2, n=600)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    config = replace(CONFIG, q_clusters=20, k_clusters=40, min_k_ratio=0.0, top_p=top_p)
    dropped, stood_in = (
        svg2_attention(q, k, v, Layout(0, 600), replace(config, compensation=c), backend=backend)
        for c in ("off", "centroid")
    )
    assert dropped.density.item() == stood_in.density.item() < 0.9
    assert errors(stood_in.out, dense)[0] <= 0.5 * errors(dropped.out, dense)[0]


def test_compensation_is_exact_where_clusters_are_points(backend, device):
    """Tokens repeated at a few places: their centroid says everything, so nothing is lost at any density."""
    g = cases.generator(8)
    place = torch.randint(12, (240,), generator=g)
    k, v = (torch.randn(12, 64, generator=g)[place][None, None].to(device) for _ in range(2))
    q = torch.randn(1, 1, 240, 64, generator=g).to(device)
    config = of(backend, k_clusters=cases.sized(backend, 100, 40), top_p=0.2, min_k_ratio=0.0)
    result = svg2_attention(q, k, v, Layout(0, 240), config, backend=backend)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert result.density < 0.6
    assert errors(result.out, dense)[0] <= 1e-5


def test_result_follows_the_queries_memory(backend, device):
    q, k, v = random_qkv(9, device, memory="bnhd")
    for heads_at_a_time in (None, 2):
        out = svg2_attention(q, k, v, Layout(0, 210), CONFIG, backend=backend, heads_at_a_time=heads_at_a_time).out
        assert out.transpose(1, 2).is_contiguous(), heads_at_a_time  # ComfyUI wants [B, N, H * D]: no copy


@pytest.mark.parametrize("heads_at_a_time", [1, 2, 3, 5])
def test_heads_at_a_time_changes_nothing(backend, dtype, device, heads_at_a_time):
    q, k, v = random_qkv(10, device, dtype)
    layout = Layout(11, 160)
    whole = svg2_attention(q, k, v, layout, CONFIG, backend=backend)
    parts = svg2_attention(q, k, v, layout, CONFIG, backend=backend, heads_at_a_time=heads_at_a_time)
    assert same(whole, parts)
    assert parts.density.item() == pytest.approx(whole.density.item(), rel=1e-6)
    warm = svg2_attention(q, k, v, layout, CONFIG, whole.centroids, backend=backend)
    warm_parts = svg2_attention(
        q, k, v, layout, CONFIG, whole.centroids, backend=backend, heads_at_a_time=heads_at_a_time
    )
    assert same(warm, warm_parts) and not same(warm, whole)


def test_rows_are_their_own_business(backend, dtype, device):
    """Two warm rows and a cold one in a batch equal each alone, bit for bit: result, centroids, and density's mean."""
    q, k, v = random_qkv(11, device, dtype, b=3)
    layout = Layout(11, 160)
    past = svg2_attention(q, k, v, layout, CONFIG, backend=backend).centroids
    q, k = q * 1.1, k + 0.1
    for warm in ([past[0], None, past[2]], [None, None, None], past):
        together = svg2_attention(q, k, v, layout, CONFIG, warm, backend=backend)
        alone = [
            svg2_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], layout, CONFIG, warm[i : i + 1], backend=backend)
            for i in range(3)
        ]
        for i in range(3):
            assert torch.equal(alone[i].out[0], together.out[i])
            assert same_past(alone[i].centroids[0], together.centroids[i])
        mean = sum(a.density.item() for a in alone) / 3
        assert together.density.item() == pytest.approx(mean, rel=1e-6)


def test_rows_are_their_own_business_with_threads(backend, device):
    """Large enough for torch to share the products out among threads."""
    torch.set_num_threads(2)
    q, k, v = random_qkv(16, device, n=1500)
    config = replace(CONFIG, q_clusters=3, k_clusters=40, kmeans_init_iters=2)
    together = svg2_attention(q, k, v, Layout(0, 1500), config, backend=backend)
    for i in range(2):
        row = slice(i, i + 1)
        alone = svg2_attention(q[row], k[row], v[row], Layout(0, 1500), config, backend=backend)
        assert torch.equal(alone.out[0], together.out[i])


def test_centroids_carry_over_through_the_cache(backend, device):
    """A cold call runs kmeans_init_iters rounds; the next one kmeans_iters rounds from what the cache gives back."""
    q, k, v = random_qkv(12, device, b=1)
    layout, cache = Layout(11, 160), CentroidCache()
    config, block = replace(CONFIG, seed=5, metric_directions=0), Key("positive", "block")
    cold = svg2_attention(q, k, v, layout, config, [cache.get(block)], backend=backend)
    cache.put(block, cold.centroids[0])
    entry = cache.get(block)
    warm = svg2_attention(q, k, v, layout, config, [entry], backend=backend)
    for role, (x, c, name) in enumerate(((q, 9, "q"), (k, 21, "k"))):
        x = x[:, :, 11:171]
        start = kmeans(x, c, iterations=4, seed=5, role=role, backend=backend).centroids
        assert torch.equal(getattr(entry, name), start[0].half())
        on = kmeans(x, c, iterations=2, init=start.half().float(), backend=backend).centroids
        assert torch.equal(getattr(warm.centroids[0], name), on[0].half())


@pytest.mark.parametrize("change", [{"q_clusters": 8}, {"k_clusters": 20}, {"q_clusters": 8, "k_clusters": 20}])
def test_centroids_of_another_shape_are_a_cold_start(backend, device, change):
    """Only the side that does not fit starts cold."""
    q, k, v = torch.randn(3, 1, 3, 210, 64, generator=cases.generator(13)).to(device)  # no clusters to converge to
    past = svg2_attention(q, k, v, Layout(0, 210), replace(CONFIG, **change), backend=backend).centroids
    result = svg2_attention(q, k, v, Layout(0, 210), CONFIG, past, backend=backend)
    cold = svg2_attention(q, k, v, Layout(0, 210), CONFIG, backend=backend)
    assert torch.equal(result.centroids[0].q, cold.centroids[0].q) == ("q_clusters" in change)
    assert torch.equal(result.centroids[0].k, cold.centroids[0].k) == ("k_clusters" in change)


def test_scale(backend, device):
    q, k, v = random_qkv(14, device)
    config = replace(CONFIG, top_p=1.0)
    result = svg2_attention(q, k, v, Layout(0, 210), config, scale=0.31, backend=backend)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.31)
    assert errors(result.out, dense)[0] <= 1e-6
    sparse = replace(CONFIG, top_p=0.5)
    assert torch.equal(
        svg2_attention(q, k, v, Layout(0, 210), sparse, scale=0.5, backend=backend).out,
        svg2_attention(q * 4, k, v, Layout(0, 210), sparse, scale=0.125, backend=backend).out,
    )  # a power of two changes no rounding: the scale enters the map and the attention alike


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": lambda k: k[:, :, 1:]}, "k"),
        ({"k": lambda k: k[:, :1]}, "k"),
        ({"v": lambda v: v[:, :1]}, "v"),
        ({"v": lambda v: v.half()}, "v"),
        ({"layout": lambda _: Layout(10, 210)}, "layout"),
        ({"layout": lambda _: Layout(0, 200, torch.zeros(2, 3))}, "text_bias"),
        ({"config": lambda c: replace(c, q_clusters=211)}, "q_clusters"),
        ({"config": lambda c: replace(c, k_clusters=211)}, "k_clusters"),
        ({"warm": lambda _: [None]}, "warm"),
        ({"warm": lambda _: [Centroids(torch.zeros(3, 9, 64), torch.zeros(3, 21, 64)), None, None]}, "warm"),
        ({"heads_at_a_time": lambda _: -1}, "heads_at_a_time"),
        ({"backend": lambda _: "warp"}, "backend"),
    ],
    ids=["k-tokens", "k-heads", "v-heads", "v-dtype", "layout", "text_bias", "q_clusters", "k_clusters", "warm-short",
         "warm-long", "heads_at_a_time", "backend"],
)  # fmt: skip
@pytest.mark.parametrize("heads_at_a_time", [None, 1])
def test_bad_input_is_named(backend, change, named, heads_at_a_time):
    q, k, v = random_qkv(15, "cpu")
    good = {"q": q, "k": k, "v": v, "layout": Layout(0, 210), "config": CONFIG, "warm": None,
            "backend": backend, "heads_at_a_time": heads_at_a_time}  # fmt: skip
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        svg2_attention(**{**good, **{name: change(good[name]) for name, change in change.items()}})
