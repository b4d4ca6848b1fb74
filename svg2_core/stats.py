"""What ran and why: counters during a run, an immutable report after it."""

import threading
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field

import torch

from .reasons import Reason

# Dense calls that were never candidates: they do not count in the share of sparse calls.
_NOT_CANDIDATES = {Reason.NOT_VIDEO_SELF_ATTENTION, Reason.NO_RUN}


@dataclass(frozen=True)
class StepReport:
    """One sampling step. sparse: any sparse call in it; density: mean over its sparse calls, None if there are none."""

    index: int
    sigma: float
    sparse: bool
    seconds: float
    density: float | None


@dataclass(frozen=True)
class RunReport:
    """One finished sampling run.

    tokens: longest sequence of video tokens seen; density: mean over sparse calls, None if there were none;
    sparse_share: sparse calls over all video self-attention calls; dense_calls: count by reason name;
    density_by_block_and_step: rows follow block_labels, columns follow steps, None where the block ran dense.
    """

    tokens: int
    density: float | None
    sparse_share: float
    sparse_calls: int
    dense_calls: dict[str, int]
    backend: str | None
    steps: list[StepReport]
    block_labels: list[str]
    density_by_block_and_step: list[list[float | None]]
    seconds: float
    completed: bool
    notices: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The report as plain dicts, lists, numbers and strings, ready for JSON."""
        return asdict(self)

    @property
    def summary(self) -> str:
        """One line for the log."""
        sparse_steps = sum(s.sparse for s in self.steps)
        sparse_blocks = sum(any(cell is not None for cell in row) for row in self.density_by_block_and_step)
        dense = ", ".join(f"{name} {count}" for name, count in self.dense_calls.items()) or "none"
        if self.completed and not self.steps:
            return "SVG2: this model and sampler do not announce their evaluations; they ran as if the node were not there"
        if not self.sparse_calls:
            return f"SVG2: every call ran dense ({len(self.steps)} steps); dense calls: {dense}"
        return (
            f"SVG2: {self.tokens:,} tokens, density {self.density:.1%}, backend {self.backend}, "
            f"{self.sparse_share:.0%} of calls sparse, in {sparse_steps} of {len(self.steps)} steps and {sparse_blocks} of "
            f"{len(self.block_labels)} blocks; dense calls: {dense}"
        )


class Stopwatch:
    """Seconds spent in a region, on the device's own clock where it has one; read without waiting until the end."""

    def __init__(self, device: torch.device):
        self._events = None
        self._stopped = False
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record(self._stream)
        else:
            self._start = time.perf_counter()

    @torch.compiler.disable
    def stop(self) -> None:
        if self._events:
            self._events[1].record(self._stream)
        else:
            self._seconds = time.perf_counter() - self._start
        self._stopped = True

    def seconds(self) -> float:
        """Waits for the device; call it once a run is over. 0 for a region that was never left (another thread's)."""
        if not self._stopped:
            return 0.0
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._seconds


class RunStats:
    """Counters of one run, from one thread per GPU. Nothing here waits for the device before `report`."""

    def __init__(self):
        self.began = time.perf_counter()
        self.tokens = 0
        self.backend: str | None = None
        self.dense: Counter[Reason] = Counter()
        self.notices: dict[Reason, str] = {}
        self._densities: list[tuple[int, str, torch.Tensor]] = []
        self._watches: list[tuple[int, Stopwatch]] = []
        self._sigmas: dict[int, float] = {}
        self._labels: dict[str, None] = {}  # an ordered set: blocks in the order they were first seen
        self._lock = threading.Lock()

    @torch.compiler.disable
    def model_call(self, step: int, sigma: float, device: torch.device) -> Stopwatch:
        """Begin timing one model evaluation; the caller stops the watch."""
        watch = Stopwatch(device)
        with self._lock:
            self._sigmas.setdefault(step, sigma)
            self._watches.append((step, watch))
        return watch

    def dense_call(self, reason: Reason, block: str | None = None, detail: str = "") -> bool:
        """Count a dense call; True the first time this run sees the reason."""
        with self._lock:
            if block is not None:
                self._labels.setdefault(block)
            self.dense[reason] += 1
            first = reason not in self.notices
            if first:
                self.notices[reason] = reason.sentence + (f" ({detail})" if detail else "")
            return first

    def sparse_call(self, step: int, block: str, tokens: int, density: torch.Tensor, backend: str) -> None:
        with self._lock:
            self._labels.setdefault(block)
            self._densities.append((step, block, density))
            self.tokens = max(self.tokens, tokens)
            self.backend = backend

    def report(self, completed: bool) -> RunReport:
        """Sum up; waits for the device once."""
        with self._lock:  # of a failed run, another GPU may still be in an evaluation
            return self._report(completed)

    def _report(self, completed: bool) -> RunReport:
        seconds: Counter[int] = Counter()
        for step, watch in self._watches:
            seconds[step] += watch.seconds()
        values = _to_host([d for *_, d in self._densities])
        cells: dict[tuple[str, int], list[float]] = {}
        for (step, block, _), value in zip(self._densities, values, strict=True):
            cells.setdefault((block, step), []).append(value)
        indices = sorted(self._sigmas)
        by_step = {i: [v for (_, s), vs in cells.items() if s == i for v in vs] for i in indices}
        steps = [
            StepReport(i, self._sigmas[i], bool(by_step[i]), seconds[i], _mean(by_step[i])) for i in indices
        ]
        candidates = len(values) + sum(n for reason, n in self.dense.items() if reason not in _NOT_CANDIDATES)
        return RunReport(
            tokens=self.tokens,
            density=_mean(values),
            sparse_share=len(values) / candidates if candidates else 0.0,
            sparse_calls=len(values),
            dense_calls={r.value: n for r, n in self.dense.items() if r not in _NOT_CANDIDATES},
            backend=self.backend,
            steps=steps,
            block_labels=list(self._labels),
            density_by_block_and_step=[[_mean(cells.get((b, i), [])) for i in indices] for b in self._labels],
            seconds=time.perf_counter() - self.began,
            completed=completed,
            notices=[text for reason, text in self.notices.items() if not reason.expected],
        )


def _to_host(scalars: list[torch.Tensor]) -> list[float]:
    """Values of 0-d tensors, waiting once per device."""
    values = [0.0] * len(scalars)
    for device in {s.device for s in scalars}:
        places = [i for i, s in enumerate(scalars) if s.device == device]
        for i, value in zip(places, torch.stack([scalars[i] for i in places]).tolist(), strict=True):
            values[i] = value
    return values


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


class StatsHandle:
    """What the node hands out as SVG2_STATS: the reports of the last few finished runs of its patched model."""

    def __init__(self, keep: int = 4):
        self._reports: deque[RunReport] = deque(maxlen=keep)

    def add(self, report: RunReport) -> None:
        self._reports.append(report)

    def latest(self) -> RunReport | None:
        return self._reports[-1] if self._reports else None

    def reports(self) -> list[RunReport]:
        """Oldest first."""
        return list(self._reports)
