"""SVG2Config: every wrong value is refused by name; cluster counts follow the number of tokens."""

import math
from dataclasses import FrozenInstanceError

import pytest
from svg2_pack.svg2_core.config import SVG2Config

WRONG = {
    "density": [0, -0.1, 1.01, math.nan, math.inf],
    "metric_directions": [-1],
    "variance_directions": [-1],
    "first_block_share": [0, 0.9, -1.0, math.nan],
    "top_p": [0, -0.1, 1.01, math.nan, math.inf],
    "min_k_ratio": [-0.1, 1.1, math.nan],
    "q_clusters": [0, -1],
    "k_clusters": [0, -1],
    "q_clusters_per_sqrt_token": [0, -1.0, math.nan],
    "tokens_per_k_cluster": [0, -1.0, math.nan],
    "max_k_clusters": [0, -5],
    "kmeans_init_iters": [0, -1],
    "kmeans_iters": [0, -1],
    "compensation": ["", "on", "auto", None],
    "warmup_steps": [-1, -100],
    "warmup_fraction": [-0.1, 1.1, math.nan],
    "end_percent": [-0.1, 1.1, math.nan],
    "dense_blocks": ["3-x", "auto", ","],
    "min_tokens": [-1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}\b") as error:
        SVG2Config(**{name: value})
    part = value if isinstance(value, str) else repr(value)
    assert part in str(error.value)


@pytest.mark.parametrize(
    "name", ["q_clusters", "k_clusters", "max_k_clusters", "kmeans_init_iters", "kmeans_iters", "warmup_steps", "metric_directions",
             "variance_directions"]
)  # fmt: skip
def test_counts_are_whole_numbers(name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        SVG2Config(**{name: 2.5})


def test_limits_are_accepted():
    SVG2Config(top_p=1.0, min_k_ratio=0.0, q_clusters=1, k_clusters=1, kmeans_init_iters=1, kmeans_iters=1,
               warmup_steps=0, warmup_fraction=0.0, end_percent=0.0, dense_blocks="", min_tokens=0)  # fmt: skip
    SVG2Config(density=1.0, metric_directions=0, variance_directions=0, first_block_share=1.0)
    SVG2Config(top_p=1e-6, density=1e-6, min_k_ratio=1.0, warmup_fraction=1.0, end_percent=1.0, warmup_steps=10**6)


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        SVG2Config().top_p = 0.5


@pytest.mark.parametrize(
    ("tokens", "q", "k"),
    [
        (75600, 300, 1000),  # the published counts at 720p
        (32760, 197, 1000),  # 480p: published 200, a square root through 720p's 300 gives 197
        (3276, 62, 100),
        (1, 1, 1),
        (2, 2, 1),
    ],
)
def test_auto_counts(tokens, q, k):
    assert SVG2Config().cluster_counts(tokens) == (q, k)


@pytest.mark.parametrize("per_token", [0.01, 0.5, 1.0, 30.0])
def test_auto_counts_fit_the_tokens(per_token):
    """Whatever the rates, an auto count is one that k-means can serve."""
    config = SVG2Config(q_clusters_per_sqrt_token=7.0, tokens_per_k_cluster=per_token, max_k_clusters=10**6)
    for tokens in range(1, 300):
        q, k = config.cluster_counts(tokens)
        assert 1 <= q <= tokens and 1 <= k <= tokens


def test_fixed_counts_are_kept():
    assert SVG2Config(q_clusters=77, k_clusters=5000).cluster_counts(100) == (77, 5000)
    assert SVG2Config(k_clusters=7).cluster_counts(75600) == (300, 7)


# The density asked for is a mean over the blocks.


@pytest.mark.parametrize("total", [2, 3, 6, 40, 60])
@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("share", [1.5, 2.0, 6.0])
def test_shares_of_the_blocks_have_the_density_as_their_mean(total, density, share):
    config = SVG2Config(density=density, first_block_share=share)
    shares = [config.of_block(block, total).density for block in range(total)]
    assert sum(shares) / total == pytest.approx(density, rel=1e-9)
    assert all(0 < s <= 1 for s in shares) and len(set(shares[1:])) == 1
    assert shares[1] >= 0.6 * density - 1e-12, "the others keep most of theirs"
    assert shares[0] == pytest.approx(min(share * density, (0.4 * total + 0.6) * density, 1.0))


def test_where_there_is_nothing_to_share_out():
    config = SVG2Config(density=0.05, first_block_share=6.0)
    assert config.of_block(0, None) is config and config.of_block(0, 1) is config
    for same in (SVG2Config(density=0.05), SVG2Config(top_p=1.0, first_block_share=6.0), SVG2Config(density=1.0, first_block_share=6.0)):
        assert same.of_block(0, 40) is same and same.of_block(7, 40) is same


def test_by_mass_the_first_block_gets_the_papers_share_at_least():
    config = SVG2Config(top_p=0.4, first_block_share=6.0)
    assert [config.of_block(block, 3).top_p for block in range(3)] == [0.9, 0.4, 0.4]
    assert SVG2Config(top_p=0.95, first_block_share=6.0).of_block(0, 3).top_p == 0.95
    assert SVG2Config(top_p=0.4).of_block(0, 3).top_p == 0.4, "the paper's preset shares nothing out"
