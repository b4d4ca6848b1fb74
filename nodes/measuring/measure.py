"""What SVG2 gains on this machine: dense attention and sparse calls, timed in turn on made-up activations, each with its error."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import comfy.model_management
import torch
from comfy.ldm.modules.attention import optimized_attention

from ...svg2_core.attention import AttentionResult, svg2_attention
from ...svg2_core.layout import Layout
from ...svg2_core.metrics import rel_l2
from ...svg2_core.presets import preset_config
from ...svg2_core.stopwatch import Stopwatch
from ..report import times

PRESET, HEAD_DIM = "balanced", 128
# Tokens of both sizes, heads and precision. The second size shows how the gain grows.
SIZES = {"cuda": ((16_384, 32_760), 8, torch.bfloat16), "cpu": ((4_096, 8_192), 2, torch.float32)}
SECONDS = 8.0  # for all of it; what kernels take once, at their first use, comes on top
MOST_ROUNDS = 7
EXACT_ROWS = 32
# The made-up activations give errors of 0.04 to 0.06 at any of the sizes, with the preset's density of 5%.
EXPECTED_ERROR = 0.1
DENSE_ERROR = 0.2  # quantised attention, which the host may have been started with, stays below

clock = time.perf_counter


class OutOfTime(Exception):
    """The measurement ends here, with what it has; the message says why."""


class Budget:
    """Seconds of SECONDS that are left."""

    def __init__(self):
        self._end, self.first_use = clock() + SECONDS, 0.0

    def excuse(self, seconds: float) -> None:
        """Time that only the first use of a kernel takes does not count."""
        self.first_use += seconds
        self._end += seconds

    def left(self) -> float:
        return self._end - clock()


@dataclass
class Way:
    """One way to answer the call. `call` returns the output; `error` is relative L2, on rows that were answered exactly too."""

    name: str
    stage: str
    call: Callable[[], torch.Tensor | AttentionResult]
    expected: float
    prepare: Callable[[], object] | None = None  # what the call needs first
    error: float = 0.0
    density: float = 1.0
    extra_mib: float | None = None
    times: list[float] = field(default_factory=list)  # milliseconds


def measure(device: torch.device, backend: str) -> tuple[list[str], list[dict]]:
    """-> (sentences, one record per time). Raises nothing: what went wrong is a sentence, beside what was found until then."""
    sizes, heads, dtype = SIZES[device.type]
    budget, lines, records, size = Budget(), [], [], None
    for number, tokens in enumerate(sizes):
        try:
            if number:
                size.check_time_for(tokens)
            size = Size(device, tokens, heads, dtype, backend, budget)
            size.prepare()
            size.time(before=sizes[number + 1] if number + 1 < len(sizes) else None)
        except OutOfTime as reason:
            lines.append(f"speed at {tokens:,} tokens: not measured: {reason}")
            break
        except Exception as error:  # the report is wanted most where something is broken
            lines.append(f"speed at {tokens:,} tokens: not measured: {in_words(error)}")
            comfy.model_management.soft_empty_cache()
            break
        lines += size.lines()
        records += size.records()
        if len(size.ways) < 3:
            break
    if budget.first_use > 1:
        lines.append(f"The kernels' first use took {budget.first_use:.1f} s more, once, which is not in these times.")
    if records:
        lines.append("The more tokens a video has, the more there is to gain.")
    return lines, records


def in_words(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has too little free memory for it; unload models, then run this again"
    return f"it failed ({type(error).__name__}: {error})"


class Size:
    """The measurement at one number of tokens."""

    def __init__(self, device, tokens: int, heads: int, dtype: torch.dtype, backend: str, budget: Budget):
        self.device, self.tokens, self.heads, self.dtype = device, tokens, heads, dtype
        self.backend, self.budget, self.config = backend, budget, preset_config(PRESET, "other")
        self.ways: list[Way] = []
        self.failures: list[str] = []

    def prepare(self) -> None:
        """Make the inputs, and try each way once: what fails or is wrong is not timed. Raises OutOfTime."""
        qkv, layout = made_up(self.device, self.tokens, self.heads, self.dtype), Layout(0, self.tokens)
        rows = torch.linspace(0, self.tokens - 1, EXACT_ROWS, device=self.device).long()
        truth = exact(*qkv, rows)

        def dense():
            return optimized_attention(*qkv, self.heads, skip_reshape=True, skip_output_reshape=True)

        def sparse(inputs=qkv, warm=None):
            return svg2_attention(*inputs, layout, self.config, warm, backend=self.backend)

        @lru_cache
        def past():
            return sparse([slightly_different(x) for x in qkv]).centroids  # as the step before leaves them

        sparse_ways = (
            Way(f"SVG2 ({self.backend}), the first sparse step", "whole call cold", sparse, EXPECTED_ERROR),
            Way(f"SVG2 ({self.backend}), every later step", "whole call", lambda: sparse(warm=past()), EXPECTED_ERROR, past),
        )
        self._try(Way(f"ComfyUI's attention ({host_attention()})", "dense", dense, DENSE_ERROR), rows, truth)
        for way in sparse_ways:
            if not self._try(way, rows, truth):
                break

    def _try(self, way: Way, rows: torch.Tensor, truth: torch.Tensor) -> bool:
        """Add a way that works. On a GPU kernels are compiled here, which is not timed; on a CPU it is a time like the others."""
        try:
            if way.prepare:
                way.prepare()
            seconds, (out, result) = self._once(way)
            wrong = rel_l2(out[:, :, rows], truth)  # by other means than the call's own
            way.error = wrong
            if result is not None:
                way.density = result.density.item()
                way.error = wrong if result.error is None else result.error.item()
            del out, result
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
                before = torch.cuda.memory_allocated(self.device)
                again, _ = self._once(way)
                way.extra_mib = (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
                self.budget.excuse(max(0.0, seconds - again))
                seconds = again
            else:
                way.times.append(1000 * seconds)
            if not wrong <= way.expected:  # NaN is wrong, too
                raise ArithmeticError(f"its error is {wrong:.3f}, where at most {way.expected:g} is expected; please report it")
        except Exception as error:
            self.failures.append(f"{way.name}: not measured: {in_words(error)}")
            comfy.model_management.soft_empty_cache()
            return False
        if self.budget.left() <= 0:
            raise OutOfTime(f"{way.name} took {seconds:.1f} s, and {SECONDS:g} s are set aside for all of this")
        self.ways.append(way)
        return True

    def _once(self, way: Way) -> tuple[float, tuple[torch.Tensor, AttentionResult | None]]:
        """-> (seconds until the device is done, (the output, the sparse call's whole result))."""
        began = clock()
        found = way.call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        result = found if isinstance(found, AttentionResult) else None
        return clock() - began, (found.out if result else found, result)

    def time(self, before: int | None) -> None:
        """All ways in turn, so that a machine that slows down slows all; as long as time is left, also for the size `before` whose
        turn it is. At least twice where there is time: a first time may be slow for reasons of its own."""
        while self.ways and len(self.ways[0].times) < MOST_ROUNDS:
            done, left = len(self.ways[0].times), self.budget.left()
            if done:
                reserve = self.needed_for(before) if before and done > 1 else 0.0
                if left - self.round_seconds() < (reserve if reserve < left else 0.0):
                    break
            watches = []
            for way in self.ways:  # with no wait between them: a call's launches are prepared while the device is busy, as in a model
                watches.append(Stopwatch(self.device))
                way.call()
                watches[-1].stop()
            for way, watch in zip(self.ways, watches, strict=True):
                way.times.append(1000 * watch.seconds())

    def round_seconds(self) -> float:
        return sum(min(way.times) for way in self.ways) / 1000

    def needed_for(self, tokens: int) -> float:
        """Seconds until each way has been tried and timed once at this many tokens, the step before that warm calls start from included."""
        growth, rounds = tokens / self.tokens, 3 if self.device.type == "cuda" else 1
        seconds = [min(way.times) / 1000 * growth ** (2 if way.stage == "dense" else 1.5) for way in self.ways]
        return rounds * sum(seconds) + max(seconds[1:], default=0.0)

    def check_time_for(self, tokens: int) -> None:
        """Raise OutOfTime where this many tokens would probably take too long."""
        needed, left = self.needed_for(tokens), self.budget.left()
        if needed > left:
            raise OutOfTime(f"it would take about {needed:.0f} s here, and {max(left, 0):.0f} s of the {SECONDS:g} s set aside are left")

    def lines(self) -> list[str]:
        name = str(self.dtype).removeprefix("torch.")
        lines = [f"speed at {self.tokens:,} tokens, {self.heads} heads of {HEAD_DIM} in {name}, preset {PRESET}:"]
        for way in self.ways:
            said = f"  {way.name}: {median(way.times):.2f} ms"
            if way.stage != "dense" and self.ways[0].stage == "dense":
                said += f", {times(median(self.ways[0].times) / median(way.times))}"
            said += f", relative error {way.error:.4f}"
            said += "" if way.stage == "dense" else f" (expected: up to {way.expected:g}), density {way.density:.0%}"
            lines.append(said)
        return [*lines, *(f"  {failure}" for failure in self.failures)]

    def records(self) -> list[dict]:
        """What the benchmark records of a time: the fields of both of its tables (record.py takes those that it needs)."""
        q_clusters, k_clusters = self.config.cluster_counts(self.tokens)
        of_all = {"dtype": str(self.dtype).removeprefix("torch."), "shape": f"doctor-{self.tokens}", "tokens": self.tokens, "heads": self.heads,
                  "text": 0, "q_clusters": q_clusters, "k_clusters": k_clusters}  # fmt: skip
        return [{**of_all, **self._record(way)} for way in self.ways]

    def _record(self, way: Way) -> dict:
        p20, p50, p80 = (quantile(way.times, share) for share in (0.2, 0.5, 0.8))
        dense = self.ways[0].stage == "dense"
        method = host_attention() if way.stage == "dense" else self.backend if self.device.type == "cuda" else PRESET
        return {
            "stage": way.stage,
            "method": method,
            "compensation": "" if way.stage == "dense" else self.config.compensation,
            "density": round(way.density, 5),
            "rel_l2": round(way.error, 6),
            "p20_ms": round(p20, 3),
            "p50_ms": round(p50, 3),
            "p80_ms": round(p80, 3),
            "times_faster": round(median(self.ways[0].times) / p50, 3) if dense else "",
            "extra_mib": "" if way.extra_mib is None else round(way.extra_mib, 1),
            "rounds": len(way.times),
        }


def host_attention() -> str:
    """The name of what ComfyUI was started with."""
    return getattr(optimized_attention, "__name__", "attention")


def quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def median(values: list[float]) -> float:
    return quantile(values, 0.5)


def made_up(device: torch.device, tokens: int, heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v `[1, H, N, D]`, in memory token by token as Wan hands them over.

    A token is noise around a point of a closed path through 50 topics. Each of 21 frames goes round it once and begins a little
    later than the one before: what belongs together lies in all frames, in runs, as in a video. Queries look for the keys of
    their topic and its neighbours. With these numbers half of the attention lies on 2% of the keys and nine tenths on 30%, and
    the preset balanced has an error of 0.05, as on activations of a video model at 12,480 tokens and up (tests/benchmarks).
    """
    topics, frames, size = 50, 21, 0.8
    g = torch.Generator(device).manual_seed(0)
    frame = torch.arange(tokens, device=device) / tokens * frames
    at = (frame % 1 + 0.3 * frame / frames) % 1 * topics
    left, share = at.long() % topics, at.frac()[:, None, None]
    for_qk, for_v = torch.randn(2, topics, heads, HEAD_DIM, generator=g, device=device)

    def along(path: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tokens, heads, HEAD_DIM, generator=g, device=device)
        return noise.add_(path[left].lerp_(path[(left + 1) % topics], share))

    qkv = (along(for_qk).mul_(size), along(for_qk).mul_(size), along(for_v))
    return [x.to(dtype)[None].transpose(1, 2) for x in qkv]


def slightly_different(x: torch.Tensor) -> torch.Tensor:
    """As a step earlier, nearly."""
    g = torch.Generator(x.device).manual_seed(1)
    return x + 0.1 * x.std() * torch.randn(x.shape, generator=g, device=x.device, dtype=x.dtype)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Attention of some query rows, fp32 `[1, H, R, D]`."""
    logits = q[:, :, rows].float() @ k.float().mT * HEAD_DIM**-0.5
    return logits.softmax(-1) @ v.float()
