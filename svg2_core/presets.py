"""The presets: settings by model family. Every number says where it is from."""

from dataclasses import replace

from .config import SVG2Config

PRESETS = ("auto", "quality", "balanced", "turbo", "paper")
FAMILIES = ("wan_t2v", "wan_i2v", "hunyuan_video", "cosmos", "other")

# The published scripts (arXiv 2505.18875): top_p 0.9, at least 10% of the key clusters, 50 iterations at first use and
# 2 per step, block 0 dense, skipped pairs dropped. Query clusters: 300 at Wan 720p (75,600 tokens) and 200 at 480p
# (32,760), which a square root of the tokens fits: 1.09 * sqrt(N) gives 300 and 197. Key clusters: 1000 at both;
# shorter sequences keep the 480p size of 32.76 tokens per cluster. Warm-up: text-to-video 10 of 50 steps;
# image-to-video 14 of 40 at 720p (480p: 8 of 40; the longer one is used for both). HunyuanVideo: 400/1000 clusters at
# 720p (118,800 tokens: 1.16 * sqrt(N)), 200/1000 at 480p; warm-up 5 of 50 steps (480p: 2). Cosmos 1.0 14B at 704 x 1280
# (56,320 tokens): 400/1000 clusters (1.69 * sqrt(N)), warm-up 10 of 35. Nothing is published for other models: they take
# text-to-video Wan's.
_PAPER = SVG2Config(
    top_p=0.9,
    min_k_ratio=0.1,
    q_clusters_per_sqrt_token=1.09,
    tokens_per_k_cluster=32.76,
    max_k_clusters=1000,
    kmeans_init_iters=50,
    kmeans_iters=2,
    metric_directions=0,
    compensation="off",
    warmup_fraction=0.2,
    dense_blocks="0",
)

# Measured on the shipped checkpoint (3,120 tokens, 20 steps, two clips with two seeds each, mean PSNR against the dense
# sample), tests/benchmarks/presets.md; all of it awaits confirmation on the real models:
# - Density 1 / 2 / 3 / 5 / 9 / 10 / 20%, every call sparse: 32.3 / 37.5 / 39.7 / 42.3 / 45.4 / 45.8 / 48.4 dB. Before the far
#   field of first order, 17% with block 0 and two steps dense: 33.4 dB.
# - Block 0 at the others' density costs 3.4 dB, at two to three times theirs nothing; dense it gains 2.8 dB for 15% more
#   work, where as much work in density gains 6. So it has a larger share and no block is dense.
# - Warm-up of 1 / 2 / 4 steps: +0.4 / +0.4 / +1.5 dB for 5 / 9 / 18% more work: density is the better use of it.
#   Of 4 / 6 / 8 steps, a first dense one: +1.4 / +1.0 / +0.4 dB for 5.8 / 4.2 / 3.4 times the work (few_steps.md). None.
# - Key clusters of 64 / 32 / 16 / 8 tokens: 36.2 / 39.6 / 42.3 / 45.1 dB; 16 bounds the cost of the stand-ins, and the paper's
#   1000 is the most. Twice the query clusters: +2.3 dB here, where they are of 51 tokens; 2 to 4% of the error at 32,760.
# - k-means with 2 + 1, 8 + 1, 8 + 2, 20 + 1 iterations: 42.5 / 42.3 / 43.0 / 42.5 dB.
# - 0 / 8 / 16 / 32 directions of variance: 41.6 / 42.3 / 42.3 / 42.3 dB; a metric in 16 / 32 / 64 directions: 41.9 / 42.3 /
#   42.1 dB, none 40.9; renewed at the first sparse step alone: 41.4.
# - top_p and min_k_ratio are for users who set top_p: then density is off, and min_k_ratio counts.
_BALANCED = SVG2Config(
    density=0.05,
    top_p=0.5,
    min_k_ratio=0.03,
    q_clusters_per_sqrt_token=1.09,
    tokens_per_k_cluster=16.0,
    max_k_clusters=1000,
    kmeans_init_iters=8,
    kmeans_iters=1,
    compensation="first_order",
    warmup_fraction=0.0,
    dense_blocks="",
    first_block_share=6.0,
)

_COMMON = {
    "quality": replace(_BALANCED, density=0.1, top_p=0.7),
    "balanced": _BALANCED,
    "turbo": replace(_BALANCED, density=0.02, top_p=0.3),
}

_BY_FAMILY = {
    "wan_t2v": {**_COMMON, "paper": _PAPER},
    "wan_i2v": {**_COMMON, "paper": replace(_PAPER, warmup_fraction=14 / 40)},
    "hunyuan_video": {**_COMMON, "paper": replace(_PAPER, warmup_fraction=5 / 50, q_clusters_per_sqrt_token=1.16)},
    "cosmos": {**_COMMON, "paper": replace(_PAPER, warmup_fraction=10 / 35, q_clusters_per_sqrt_token=1.69)},
    "other": {**_COMMON, "paper": _PAPER},
}


def preset_config(preset: str, family: str) -> SVG2Config:
    """Settings of `preset` (one of PRESETS; "auto" is "balanced") for a model `family` (one of FAMILIES).

    Raises ValueError for a name that is neither.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} is not accepted; it takes {', '.join(PRESETS)}")
    if family not in _BY_FAMILY:
        raise ValueError(f"family: {family!r} is not known; known are {', '.join(FAMILIES)}")
    return _BY_FAMILY[family]["balanced" if preset == "auto" else preset]
