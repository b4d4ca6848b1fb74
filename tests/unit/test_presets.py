"""Presets: published numbers where they are published, an order of quality, no knob left out."""

from itertools import pairwise

import pytest
from svg2_pack.svg2_core.presets import FAMILIES, PRESETS, preset_config


def test_names_of_the_contract():
    assert PRESETS == ("auto", "quality", "balanced", "turbo", "paper")


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_is_balanced(family):
    assert preset_config("auto", family) == preset_config("balanced", family)


@pytest.mark.parametrize("family", FAMILIES)
def test_paper_holds_the_published_settings(family):
    config = preset_config("paper", family)
    assert (config.top_p, config.min_k_ratio, config.kmeans_init_iters, config.kmeans_iters) == (0.9, 0.1, 50, 2)
    assert (config.dense_blocks, config.compensation, config.end_percent) == ("0", "off", 1.0)


@pytest.mark.parametrize(
    "family, tokens, q_clusters, warmup, steps",
    [
        ("wan_t2v", 75_600, 300, 10, 50),
        ("wan_t2v", 32_760, 200, 10, 50),
        ("wan_i2v", 75_600, 300, 14, 40),
        ("hunyuan_video", 118_800, 400, 5, 50),
        ("cosmos", 56_320, 400, 10, 35),
    ],
)
def test_paper_clusters_and_warmup(family, tokens, q_clusters, warmup, steps):
    """The published scripts' numbers; a rule that follows the tokens may miss them by 2%."""
    config = preset_config("paper", family)
    q, k = config.cluster_counts(tokens)
    assert abs(q - q_clusters) <= 0.02 * q_clusters and k == 1000
    assert round(config.warmup_fraction * steps) == warmup


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_go_from_exact_to_fast(family):
    """From quality to turbo nothing gets more exact, and density falls; all compensate."""
    configs = [preset_config(name, family) for name in ("quality", "balanced", "turbo")]
    for better, faster in pairwise(configs):
        assert better.density > faster.density
        assert better.top_p > faster.top_p  # where a backend has only this rule
        assert better.min_k_ratio >= faster.min_k_ratio
        assert better.warmup_fraction >= faster.warmup_fraction
    assert all(config.compensation == "first_order" for config in configs)
    assert [config.density for config in configs] == [0.1, 0.05, 0.02]


@pytest.mark.parametrize("family", FAMILIES)
def test_paper_is_the_paper(family):
    """Euclidean clusters, the rule of mass, nothing in place of what is skipped."""
    config = preset_config("paper", family)
    assert (config.density, config.metric_directions, config.compensation, config.dense_blocks) == (None, 0, "off", "0")


def test_unknown_names():
    with pytest.raises(ValueError, match=r"preset.*'fastest'.*turbo"):
        preset_config("fastest", "wan_t2v")
    with pytest.raises(ValueError, match=r"family.*'sdxl'.*wan_t2v"):
        preset_config("auto", "sdxl")
