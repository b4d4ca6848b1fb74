"""Time a sparse call against torch's own attention on this machine's CPU, with the error beside every time.

    python tests/benchmarks/run.py --device cpu            3,120 to 75,600 tokens; an hour on two cores
    python tests/benchmarks/run.py --device cpu --quick    12,480 and 32,760 tokens; ten minutes

Two heads of generated activations (activations.py), fp32, clusters warm from the step before. Against, in the same run: torch's
own attention; the paper's way (Euclidean clusters, pairs by mass, the others dropped), and strips of 64 tokens in the order of
the sequence whose pooled means stand in for what is skipped (as ComfyUI's Model Sparse Attention cuts a sequence, here in fp32
and through the same near field), both at the density at which they have the error of ours. Nothing is timed before it was
verified on rows that were computed exactly. Methods take turns, so that a machine that slows down slows all of them.

Rows are appended to results/speed_cpu.csv; `python tests/benchmarks/plot_cpu.py` draws them and renews the README's table.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import append_rows, processor
from memory import peak_mib
from shapes import HEAD_DIM, Shape
from verify import check_attention, dense_rows, sample_rows

FIELDS = ("processor", "threads", "torch", "commit", "date", "dtype", "tokens", "heads", "stage", "method", "density", "rel_l2",
          "p20_ms", "p50_ms", "p80_ms", "times_faster", "extra_mib", "rounds")  # fmt: skip
HEADS = 2
STRIP = 64
PRESETS = ("quality", "balanced", "turbo")
DENSITIES = (0.02, 0.05, 0.1, 0.2)
STAGES = ("cluster", "moments", "select_by_error", "near_field", "far_field", "exact_rows")
EXACT = 1e-4  # of fp32 attention
SHARES = 6  # of the bisection


def shape_of(grid: tuple[int, int, int]) -> Shape:
    from svg2_pack.svg2_core import preset_config

    tokens = grid[0] * grid[1] * grid[2]
    return Shape(f"{tokens}", HEADS, grid, *preset_config("balanced", "wan_t2v").cluster_counts(tokens))


GRIDS = {3120: (13, 12, 20), 12480: (13, 24, 40), 32760: (21, 30, 52), 75600: (21, 45, 80)}
ROUNDS = {3120: 9, 12480: 7, 32760: 5, 75600: 2}


@dataclass
class Contender:
    stage: str
    method: str
    call: Callable | None  # None: a stage, timed inside
    rel_l2: float
    density: float


class Bench:
    """One size. `rows` are what was found."""

    def __init__(self, tokens: int, where: dict, dtype: torch.dtype = torch.float32):
        from activations import activations
        from svg2_pack.svg2_core import Layout

        self.shape, self.where = shape_of(GRIDS[tokens]), where
        self.dtype, self.rounds = dtype, ROUNDS[tokens]
        # As Wan hands them over: a token's heads lie together.
        self.qkv = activations(self.shape.grid, HEADS, dtype=dtype, token_major=True)
        self.before = tuple(x + 0.1 * x.std() * _noise(x, i) for i, x in enumerate(self.qkv))  # nearly the same: a step earlier
        self.layout, self.sampled = Layout(0, tokens), sample_rows(self.shape, "cpu")
        self.truth = dense_rows(*self.qkv, self.sampled)
        self.contenders: list[Contender] = []
        self.rows: list[dict] = []

    def error_of(self, name: str, out: torch.Tensor, most: float = 1.0) -> float:
        return check_attention(name, out, self.truth, self.sampled, most)

    def dense(self) -> None:
        def call():
            return torch.nn.functional.scaled_dot_product_attention(*self.qkv)

        error = self.error_of("torch's attention", call(), EXACT if self.dtype == torch.float32 else 1e-2)
        self.contenders.append(Contender("dense", "torch", call, error, 1.0))

    def ours(self, name: str, config) -> Contender:
        """A whole warm call."""
        from svg2_pack.svg2_core import svg2_attention

        start = replace(config, kmeans_init_iters=8)  # not timed
        past = svg2_attention(*self.before, self.layout, start, backend="sdpa").centroids

        def call():
            return svg2_attention(*self.qkv, self.layout, config, past, backend="sdpa")

        result = call()
        made = Contender("whole call", name, lambda: call().out, self.error_of(name, result.out), result.density.item())
        self.contenders.append(made)
        return made

    def paper(self, name: str, target: float) -> None:
        """The paper's way with the least top_p that has this error or less."""
        from svg2_pack.svg2_core import preset_config, svg2_attention

        paper = replace(preset_config("paper", "wan_t2v"), min_k_ratio=0.0, kmeans_init_iters=8)
        past = svg2_attention(*self.before, self.layout, paper, backend="sdpa").centroids

        def at(top_p):
            return svg2_attention(*self.qkv, self.layout, replace(paper, top_p=top_p), past, backend="sdpa")

        top_p = least(lambda share: self.error_of(name, at(share).out) <= target)
        result = at(top_p)
        self.contenders.append(
            Contender("whole call", name, lambda: at(top_p).out, self.error_of(name, result.out), result.density.item())
        )

    def strips(self, name: str, target: float) -> None:
        """Strips of the sequence with pooled stand-ins, likewise."""

        def at(top_p):
            return strip_attention(*self.qkv, self.layout, top_p)

        top_p = least(lambda share: self.error_of(name, at(share)[0]) <= target)
        out, density = at(top_p)
        self.contenders.append(Contender("whole call", name, lambda: at(top_p)[0], self.error_of(name, out), density))

    def time(self) -> None:
        """All contenders in turn."""
        times: list[list[float]] = [[] for _ in self.contenders]
        for _ in range(self.rounds):
            for contender, found in zip(self.contenders, times, strict=True):
                began = time.perf_counter()
                contender.call()
                found.append(1000 * (time.perf_counter() - began))
        dense = statistics.median(times[0])
        for contender, found in zip(self.contenders, times, strict=True):
            self.add(contender, found, dense, peak_mib(contender.call))
        self.contenders = []

    def add(self, contender: Contender, times: list[float], dense: float, extra: float | None) -> None:
        p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        row = {**self.where, "dtype": str(self.dtype).removeprefix("torch."), "tokens": self.shape.tokens, "heads": HEADS,
               "stage": contender.stage, "method": contender.method, "density": round(contender.density, 5),
               "rel_l2": round(contender.rel_l2, 6), "p20_ms": round(p20, 2), "p50_ms": round(p50, 2), "p80_ms": round(p80, 2),
               "times_faster": "" if contender.call is None else round(dense / p50, 3), "extra_mib": extra and round(extra, 1), "rounds": len(times)}  # fmt: skip
        self.rows.append(row)
        print(f"  {row['dtype']:9} {contender.stage:12} {contender.method:26} {p50:10.1f} ms  {100 * p50 / dense:6.1f}% of dense  "
              f"error {contender.rel_l2:.4f}  density {contender.density:.3f}", flush=True)  # fmt: skip

    def stages(self, name: str, config) -> None:
        """How long a warm call's stages take, of both heads side by side: medians of the sums over heads, by worker."""
        from svg2_pack.svg2_core import attention, svg2_attention

        past = svg2_attention(*self.before, self.layout, config, backend="sdpa").centroids
        workers = min(HEADS, torch.get_num_threads())
        found = {stage: [] for stage in STAGES}
        for _ in range(self.rounds):
            spent, real = dict.fromkeys(STAGES, 0.0), {stage: getattr(attention, stage) for stage in STAGES}
            try:
                for stage, function in real.items():
                    setattr(attention, stage, _timed(function, spent, stage))
                svg2_attention(*self.qkv, self.layout, config, past, backend="sdpa")
            finally:
                for stage, function in real.items():
                    setattr(attention, stage, function)
            for stage, seconds in spent.items():
                found[stage].append(1000 * seconds / workers)
        dense = next(row["p50_ms"] for row in self.rows if row["stage"] == "dense")
        whole = next(row for row in self.rows if row["method"] == name)
        for stage, times in found.items():
            self.add(Contender(f"stage of {name}", stage, None, whole["rel_l2"], whole["density"]), times, dense, None)


def _noise(x: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


def _timed(function: Callable, spent: dict, stage: str) -> Callable:
    def run(*args, **kwargs):
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[stage] += time.perf_counter() - began

    return run


def least(holds: Callable[[float], bool]) -> float:
    """The least share of mass, from 0.02 to 1 (which is dense and always holds), at which `holds`: by bisection."""
    low, high = 0.02, 1.0
    for _ in range(SHARES):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def strip_attention(q, k, v, layout, top_p: float) -> tuple[torch.Tensor, float]:
    """Attention over strips: -> (out, density)."""
    from svg2_pack.svg2_core.attention import exact_pairs
    from svg2_pack.svg2_core.ops.exact_rows import ExactRows
    from svg2_pack.svg2_core.ops.far_field import far_field
    from svg2_pack.svg2_core.ops.kmeans import Clusters, cluster_means
    from svg2_pack.svg2_core.ops.moments import Moments
    from svg2_pack.svg2_core.ops.near_field import near_field
    from svg2_pack.svg2_core.ops.select import select_by_mass
    from svg2_pack.svg2_core.threads import side_by_side

    n, out = q.shape[2], torch.empty_like(q)
    offsets = torch.tensor([*range(0, n, STRIP), n], dtype=torch.int32)[None, None]
    order, of = torch.arange(n, dtype=torch.int32)[None, None], {"scale": HEAD_DIM**-0.5, "backend": "sdpa"}

    def head(j: int) -> float:
        x = [x[:, j : j + 1].contiguous() for x in (q, k, v)]
        empty = Clusters(order, offsets, x[0].new_zeros(1, 1, offsets.shape[-1] - 1, HEAD_DIM))
        means = [cluster_means(y, empty, backend="sdpa") for y in x]
        groups = [empty._replace(centroids=mean) for mean in means[:2]]
        selected = select_by_mass(*groups, top_p=top_p, min_k_ratio=0.0, **of)
        _, logsumexp = near_field(*x, *groups, selected, layout=layout, out=out[:, j : j + 1], **of)
        none = ExactRows(torch.zeros(1, 1, dtype=torch.long), x[0].new_zeros(1, 1, 1, HEAD_DIM).float())
        far_field(*x, out[:, j : j + 1], logsumexp, *groups, Moments(means[2]), selected, layout=layout, order=0, exact=none, **of)
        return exact_pairs(*groups, selected).item() / n**2

    densities = side_by_side(head, range(q.shape[1]))
    return out, sum(densities) / len(densities)


def one_size(tokens: int, where: dict) -> list[dict]:
    from svg2_pack.svg2_core import preset_config

    print(f"{tokens:,} tokens, {HEADS} heads", flush=True)
    bench = Bench(tokens, where)
    bench.dense()
    presets = {name: preset_config(name, "wan_t2v") for name in (*PRESETS, "paper")}
    made = {name: bench.ours(name, config) for name, config in presets.items()}
    named = {config.density for config in presets.values()}
    for density in DENSITIES:
        if density not in named:
            bench.ours(f"density {density:g}", replace(presets["balanced"], density=density))
    for name in ("balanced", "turbo"):
        bench.paper(f"paper at {name}'s error", made[name].rel_l2)
        bench.strips(f"strips at {name}'s error", made[name].rel_l2)
    bench.time()
    bench.stages("balanced", presets["balanced"])
    rows = bench.rows
    if tokens == 32760:
        half = Bench(tokens, where, torch.bfloat16)
        half.dense()
        for name in PRESETS:
            half.ours(name, presets[name])
        half.time()
        rows += half.rows
    return rows


def run(where: dict, quick: bool, sizes: list[int] | None, path: Path) -> list[dict]:
    """where: commit, date, torch of run.py's `machine`. Rows are written after each size."""
    where = {name: where[name] for name in ("torch", "commit", "date")}
    where = {"processor": processor(), "threads": torch.get_num_threads(), **where}
    rows = []
    with torch.inference_mode():
        for tokens in sizes or ((12480, 32760) if quick else GRIDS):
            new = one_size(tokens, where)
            append_rows(path, new, FIELDS)
            rows += new
    return rows
