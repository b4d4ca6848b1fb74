"""The settings of one sampling run: frozen, validated, free of anything that depends on the call."""

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

COMPENSATION = ("off", "centroid", "first_order")
_PAPERS_TOP_P = 0.9
MAX_CLUSTERS = 8192  # counters of more do not fit into a GPU's shared memory


@dataclass(frozen=True)
class SVG2Config:
    """Settings of the algorithm.

    density: share of the pairs of video tokens computed exactly, chosen by the error of leaving pairs out; >= 1 selects all;
        None: pairs are chosen by top_p. In a model it is the mean over the blocks, see `of_block`.
    top_p: the paper's rule, where density is None: share of the (estimated) attention mass that the selected key clusters of a query cluster reach; >= 1 selects all.
    min_k_ratio: with top_p, least share of the key clusters selected per query cluster.
    q_clusters, k_clusters: fixed counts, or None to follow the number of video tokens N:
        q = q_clusters_per_sqrt_token * sqrt(N), k = min(N / tokens_per_k_cluster, max_k_clusters).
    kmeans_init_iters, kmeans_iters: Lloyd iterations at the first use of a block in a run, and at each later step.
    metric_directions: clusters are made in the metric of the logits, in so many of its directions; 0: in the tokens' own space.
    variance_directions: of the within-cluster variance of keys, in so many directions the far field of first order follows it.
    compensation: of what is skipped. "first_order": each key cluster's mass, and how its values move with the query;
        "centroid": its centroid stands in for its members; "off" drops them (the paper).
    first_block_share: how many times the density of the mean the first block of a model is given.
    warmup_steps: leading sampling steps kept dense, or None for warmup_fraction of the steps (at least one if > 0).
    end_percent: share of the sampling steps after which attention is dense again.
    dense_blocks: transformer blocks kept dense, such as "0-2,-1"; "" for none.
    min_tokens: sequences with fewer video tokens stay dense.
    seed: of the cold start of k-means.

    Raises ValueError naming the field and what it accepts.
    """

    density: float | None = None
    top_p: float = 0.9
    min_k_ratio: float = 0.1
    q_clusters: int | None = None
    k_clusters: int | None = None
    q_clusters_per_sqrt_token: float = 1.09
    tokens_per_k_cluster: float = 32.76
    max_k_clusters: int = 1000
    kmeans_init_iters: int = 10
    kmeans_iters: int = 2
    metric_directions: int = 32
    variance_directions: int = 16
    compensation: str = "first_order"
    first_block_share: float = 1.0
    warmup_steps: int | None = None
    warmup_fraction: float = 0.2
    end_percent: float = 1.0
    dense_blocks: str = "0"
    min_tokens: int = 8192
    seed: int = 0

    def __post_init__(self):
        share = self.density
        _require(share is None or 0 < share <= 1, "density", "a number above 0 and at most 1", share)
        _require(0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1", self.top_p)
        _require(0 <= self.min_k_ratio <= 1, "min_k_ratio", "a number from 0 to 1", self.min_k_ratio)
        for name in ("q_clusters", "k_clusters"):
            value = getattr(self, name)
            accepts = f"a whole number from 1 to {MAX_CLUSTERS} (at the node: 0 for auto)"
            _require(value is None or (_whole(value) and 1 <= value <= MAX_CLUSTERS), name, accepts, value)
        for name in ("q_clusters_per_sqrt_token", "tokens_per_k_cluster"):
            _require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        for name in ("max_k_clusters", "kmeans_init_iters", "kmeans_iters"):
            value = getattr(self, name)
            _require(_whole(value) and value >= 1, name, "a whole number of at least 1", value)
        for name in ("metric_directions", "variance_directions"):
            value = getattr(self, name)
            _require(_whole(value) and value >= 0, name, "0 or more directions", value)
        _require(self.compensation in COMPENSATION, "compensation", " or ".join(COMPENSATION), self.compensation)
        _require(self.first_block_share >= 1, "first_block_share", "a number of at least 1", self.first_block_share)
        steps = self.warmup_steps
        _require(steps is None or (_whole(steps) and steps >= 0), "warmup_steps", "0 or more steps", steps)
        _require(0 <= self.warmup_fraction <= 1, "warmup_fraction", "a number from 0 to 1", self.warmup_fraction)
        _require(0 <= self.end_percent <= 1, "end_percent", "a number from 0 to 1", self.end_percent)
        _require(self.min_tokens >= 0, "min_tokens", "0 or more tokens", self.min_tokens)
        parse_block_ranges(self.dense_blocks)

    def cluster_counts(self, tokens: int, queries: int | None = None) -> tuple[int, int]:
        """Query and key cluster counts for `tokens` video tokens. Fixed counts are returned as they are.

        queries: how many there are where they are a part of the video; their clusters shrink with its square root, for a part of a
        video is nearly as diverse as all of it.
        """
        q = round(self.q_clusters_per_sqrt_token * math.sqrt(tokens))
        k = min(round(tokens / self.tokens_per_k_cluster), self.max_k_clusters)
        q, k = self.q_clusters or min(max(1, q), tokens), self.k_clusters or min(max(1, k), tokens)
        return q if queries in (None, tokens) else min(max(1, round(q * math.sqrt(queries / tokens))), queries), k


    @property
    def selects_by_error(self) -> bool:
        """Whether pairs are chosen by density, the rule of errors."""
        return self.density is not None and self.density < 1

    @property
    def selects_all(self) -> bool:
        """Whether every pair is computed: nothing is left to represent."""
        return (self.top_p if self.density is None else self.density) >= 1

    @property
    def needs_moments(self) -> bool:
        return self.selects_by_error or (self.compensation == "first_order" and not self.selects_all)

    def of_block(self, number: int, total: int | None) -> "SVG2Config":
        """The settings of a model's block (0-based, of `total` that are not kept dense): density is shared out.

        The first block gets first_block_share times the mean, the others what then makes the mean; but no less than 0.6 of
        it, so that in a model of few blocks the first one gets less. Where the total is not known all get the mean. Where
        pairs are chosen by mass, the first block's larger share is the paper's top_p at least.
        """
        if self.first_block_share == 1 or self.selects_all or total is None or total < 2:
            return self
        top_p = max(self.top_p, _PAPERS_TOP_P) if number == 0 else self.top_p
        if self.density is None:
            return replace(self, top_p=top_p)
        share = min(self.first_block_share, 0.4 * total + 0.6, 1 / self.density)
        if number > 0:
            share = (total - share) / (total - 1)
        return replace(self, density=min(1.0, share * self.density), top_p=top_p)


def _require(ok: bool, name: str, accepts: str, value) -> None:
    if not ok:  # also catches NaN, which compares false
        raise ValueError(f"{name}: {value!r} is not accepted; it takes {accepts}")


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_RANGE = re.compile(r"\s*(-?\d+)\s*(?:-\s*(-?\d+)\s*)?")


@lru_cache
def parse_block_ranges(spec: str) -> tuple[tuple[int, int], ...]:
    """Parse "0-2,-1" into inclusive ranges ((0, 2), (-1, -1)); negative numbers count from the last block.

    Raises ValueError naming dense_blocks and the part that is wrong.
    """
    ranges = []
    for part in spec.split(","):
        if not part.strip():
            if spec.strip():
                raise ValueError(f'dense_blocks: "{spec}" has an empty part; write for example "0-2,-1"')
            continue
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f'dense_blocks: "{part.strip()}" is not a block or a range; write for example "0-2,-1"')
        first = int(match[1])
        last = int(match[2]) if match[2] is not None else first
        if (first < 0) == (last < 0) and last < first:
            raise ValueError(f'dense_blocks: the range "{part.strip()}" runs backwards')
        ranges.append((first, last))
    return tuple(ranges)


def in_block_ranges(ranges: tuple[tuple[int, int], ...], block: int, total: int | None) -> bool:
    """Whether `block` (0-based) lies in `ranges`; negative bounds need the model's `total` of blocks."""
    for first, last in ranges:
        if total is None and (first < 0 or last < 0):
            continue
        if (first if first >= 0 else first + total) <= block <= (last if last >= 0 else last + total):
            return True
    return False
