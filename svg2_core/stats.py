"""What ran and why: counters during a run, an immutable report after it."""

import math
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch

from .cluster_picture import ClusterPicture, Groups
from .reasons import Reason
from .stopwatch import Stopwatch

# Dense calls that were never candidates: they do not count in the share of sparse calls.
_NOT_CANDIDATES = {Reason.NOT_VIDEO_SELF_ATTENTION, Reason.NO_RUN}

AT_THE_END = ("steps_not_faster", "calls_not_faster", "nothing_sparse", "not_announced")  # remarks of a run's end
NOT_ANNOUNCED = "this model and sampler do not announce their evaluations; they ran as if the node were not there"
WHAT_HELPS = (
    "The fewer tokens, the less there is to gain: raise min_tokens, so that such videos stay dense, lower the density (preset "
    "turbo), or switch the node off"
)


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

    tokens: longest sequence of video tokens seen; density: mean over sparse calls, None if there were none; text_share: how
    much of it is pairs with a text token, which are all exact; error: mean over sparse calls of the relative L2 error of
    attention on a few exact rows, None where the backend does not measure it;
    cold_calls: sparse calls after the first sparse step that had no past to start clusters from;
    sparse_share: sparse calls over all video self-attention calls; dense_calls: count by reason name;
    density_by_block_and_step: rows follow block_labels, columns follow steps, None where the block ran dense;
    error_by_block_and_step: the error there; expected_error_by_block_and_step: what the moments foretold, a ranking, not to scale;
    reasons_by_block_and_step: the name of the reason there, None where it ran sparse or not at all;
    settings: what the run went by, knobs at auto resolved; device: its type, such as "cuda";
    dense_call_ms, sparse_call_ms: median times of one video self-attention call (dense: of one made for comparison, where the
    run had none of its own), None if there were none, and
    attention_speedup: the first over the second; step_speedup: median seconds of the wholly dense steps over the sparse ones',
    without the run's first step;
    q_cluster_sizes, k_cluster_sizes, overlays: of the last step (see ClusterPicture), empty if nothing was sparse in it;
    notices: what the user should know, as sentences; remarks: those that are not reasons of dense calls, by name.
    devices: where several processes made the run, each with a share of it, a line for each (merged_report.py).
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
    reasons_by_block_and_step: list[list[str | None]] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)
    device: str | None = None
    dense_call_ms: float | None = None
    sparse_call_ms: float | None = None
    attention_speedup: float | None = None
    step_speedup: float | None = None
    q_cluster_sizes: list[int] = field(default_factory=list)
    k_cluster_sizes: list[int] = field(default_factory=list)
    overlays: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    text_share: float = 0.0
    error: float | None = None
    error_by_block_and_step: list[list[float | None]] = field(default_factory=list)
    expected_error_by_block_and_step: list[list[float | None]] = field(default_factory=list)
    cold_calls: int = 0
    remarks: dict[str, "Remark"] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The report as plain dicts, lists, numbers and strings, ready for JSON; without the overlays."""
        plain = asdict(replace(self, overlays={}, remarks={}))
        del plain["overlays"]
        plain["remarks"] = {name: remark._asdict() for name, remark in self.remarks.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: dict) -> "RunReport":
        """The inverse of `to_dict`."""
        steps = [StepReport(**step) for step in plain["steps"]]
        remarks = {name: Remark(**remark) for name, remark in plain["remarks"].items()}
        return cls(**{**plain, "steps": steps, "remarks": remarks})

    @property
    def summary(self) -> str:
        """One line for the log."""
        sparse_steps = sum(s.sparse for s in self.steps)
        sparse_blocks = sum(any(cell is not None for cell in row) for row in self.density_by_block_and_step)
        dense = ", ".join(f"{name} {count}" for name, count in self.dense_calls.items()) or "none"
        if self.completed and not self.steps:
            return f"SVG2: {NOT_ANNOUNCED}"
        if not self.sparse_calls:
            return f"SVG2: every call ran dense ({len(self.steps)} steps); dense calls: {dense}"
        text = f" (text {self.text_share:.1%})" if self.text_share >= 0.0005 else ""
        error = "" if self.error is None else f", attention error {self.error:.1%}"
        return (
            f"SVG2: {self.tokens:,} tokens, density {self.density:.1%}{text}{error}, backend {self.backend}, "
            f"{self.sparse_share:.0%} of calls sparse, in {sparse_steps} of {len(self.steps)} steps and {sparse_blocks} of "
            f"{len(self.block_labels)} blocks; dense calls: {dense}" + (f"; {len(self.devices)} GPUs" if self.devices else "")
        )


class Figures(NamedTuple):
    """Of one sparse call: 0-d tensors, or numbers once they are read; None where it has no such thing."""

    density: torch.Tensor | float
    error: torch.Tensor | float | None
    expected_error: torch.Tensor | float | None


def _known(entries: list[tuple[str, int, Figures]]) -> list[torch.Tensor]:
    return [x for *_, figures in entries for x in figures if x is not None]


class Remark(NamedTuple):
    """sentence: with its values; values: alone, for a sentence in another language."""

    sentence: str
    values: dict[str, str]


class RunStats:
    """Counters of one run, from one thread per GPU. Nothing here waits for the device before `report`, but for `read_with`."""

    TIMED = 256  # calls of a kind that are timed: the first dense ones, the latest sparse ones (the first compile kernels)

    def __init__(self):
        self.began = time.perf_counter()
        self.tokens = 0
        self.backend: str | None = None
        self.dense: Counter[Reason] = Counter()
        self.notices: dict[Reason, str] = {}
        self.details: dict[Reason, str] = {}  # of the first call of each reason
        self.remarks: dict[str, Remark] = {}  # by name
        self.cold: Counter[int] = Counter()  # by step, sparse calls whose clusters had no past
        self.text_share = 0.0
        self.device: str | None = None
        self.picture = ClusterPicture()
        self._unread: list[tuple[str, int, Figures]] = []  # block, step, figures still on the device
        self._cells: dict[tuple[str, int], list[Figures]] = {}  # those that have been read
        self._reasons: dict[tuple[str, int], Reason] = {}
        self._watches: list[tuple[int, Stopwatch]] = []
        self._dense_watches: list[Stopwatch] = []
        self._sparse_watches: deque[Stopwatch] = deque(maxlen=self.TIMED)
        self._sigmas: dict[int, float] = {}
        self._labels: dict[str, None] = {}  # an ordered set: blocks in the order they were first seen
        self._lock = threading.Lock()

    @torch.compiler.disable
    def model_call(self, step: int, sigma: float, device: torch.device) -> Stopwatch:
        """Begin timing one model evaluation; the caller stops the watch."""
        watch = Stopwatch(device)
        with self._lock:
            self.device = device.type
            self._sigmas.setdefault(step, sigma)
            self._watches.append((step, watch))
        return watch

    def dense_call(self, reason: Reason, block: str | None = None, detail: str = "", step: int | None = None) -> bool:
        """Count a dense call; True the first time this run sees the reason."""
        with self._lock:
            if block is not None:
                self._labels.setdefault(block)
                if step is not None:
                    self._reasons[block, step] = reason
            self.dense[reason] += 1
            first = reason not in self.notices
            if first:
                self.notices[reason] = reason.sentence + (f" ({detail})" if detail else "")
                self.details[reason] = detail
            return first

    def sparse_call(
        self, step: int, block: str, tokens: int, density: torch.Tensor, backend: str, *,
        error: torch.Tensor | None = None, expected_error: torch.Tensor | None = None, text_share: float = 0.0,
        cold: bool = False,
    ) -> None:  # fmt: skip
        """Count a sparse call: see AttentionResult for what it came to; cold: its clusters had no past."""
        figures = Figures(density, error, expected_error)
        with self._lock:
            self._labels.setdefault(block)
            self._unread.append((block, step, figures))
            self.tokens = max(self.tokens, tokens)
            self.text_share = max(self.text_share, text_share)
            self.backend = backend
            self.cold[step] += cold

    def remark(self, what: str, sentence: str, **values: str) -> bool:
        """Note, under a name, that calls run otherwise than the settings ask or the user hopes; True the first time."""
        with self._lock:
            first = what not in self.remarks
            self.remarks.setdefault(what, Remark(sentence, values))
            return first

    def clusters(self, block: str, groups: Groups, grid: tuple[int, int, int]) -> None:
        """Keep what this call's clusters look like. Of several GPUs, the last one's."""
        with self._lock:
            self.picture.take(block, groups, grid)

    def dense_watch(self, device: torch.device) -> Stopwatch | None:
        """Begin timing a dense call over video tokens; None once enough have been timed."""
        with self._lock:
            if len(self._dense_watches) == self.TIMED:
                return None
            self._dense_watches.append(watch := Stopwatch(device))
            return watch

    def reference_watch(self, device: torch.device, step: int) -> Stopwatch | None:
        """Begin timing a dense call that is made for comparison alone: one, in the second sparse step of a run that had none
        of its own to time. None otherwise."""
        with self._lock:
            if self._dense_watches or not self.cold or step <= min(self.cold):
                return None
            self._dense_watches.append(watch := Stopwatch(device))
            return watch

    def sparse_watch(self, device: torch.device) -> Stopwatch:
        """Begin timing a sparse call. One that fails is never stopped and does not count."""
        with self._lock:
            self._sparse_watches.append(watch := Stopwatch(device))
            return watch

    @torch.compiler.disable
    def read_with(self, value: torch.Tensor) -> float:
        """A 0-d tensor's value. The figures of its device's calls come along on the same trip to the host."""
        with self._lock:
            taken = self._take(value.device)
        values = iter(torch.stack([value.float(), *_known(taken)]).tolist())
        value = next(values)
        with self._lock:
            self._learn(taken, values)
        return value

    def _take(self, device: torch.device) -> list[tuple[str, int, "Figures"]]:
        """What has not been read of a device's calls."""
        taken = [entry for entry in self._unread if entry[2].density.device == device]
        self._unread = [entry for entry in self._unread if entry[2].density.device != device]
        return taken

    def _learn(self, entries: list, values: Iterator[float]) -> None:
        """values: what `_known` gave of the entries, read."""
        for block, step, figures in entries:
            read = Figures(*(None if x is None else _number(next(values)) for x in figures))
            self._cells.setdefault((block, step), []).append(read)

    def blocks_at(self, step: int) -> list[tuple[str, float | None, str | None]]:
        """Each block seen so far: its density in that step as far as it has been read, or else the reason it ran dense."""
        with self._lock:
            return [(block, _mean_of("density", self._cells.get((block, step), [])), self._reason(block, step)) for block in self._labels]

    def _reason(self, block: str, step: int) -> str | None:
        reason = None if (block, step) in self._cells else self._reasons.get((block, step))
        return reason and reason.value

    def explain_none(self) -> bool:
        """At the end of a run, remark that nothing was sparse where all reasons are in the settings: nobody would be told of it
        otherwise. True where there is no reason at all: no call was seen that could have been sparse."""
        with self._lock:
            if self._unread or self._cells:
                return False
            if not self._sigmas:
                self.remarks["not_announced"] = Remark(NOT_ANNOUNCED, {})
                return False
            counted = [reason for reason in self.dense if reason not in _NOT_CANDIDATES]
            if counted and all(reason.expected for reason in counted):
                reasons = ", ".join(f"{reason.value} {self.dense[reason]}" for reason in counted)
                sentence = f"no call of this run was sparse, as the settings ask ({reasons}): lower warmup_steps, raise end_percent, or shorten dense_blocks"
                self.remarks["nothing_sparse"] = Remark(sentence, {"reasons": reasons})
            return not counted

    def report(self, completed: bool, settings: dict[str, object] | None = None) -> RunReport:
        """Sum up; waits for the device once."""
        with self._lock:  # of a failed run, another GPU may still be in an evaluation
            return self._report(completed, settings or {})

    def _not_faster(self, steps: dict[bool, float | None], dense_ms: float | None, sparse_ms: float | None) -> None:
        """Remark on a run whose sparse attention took no less time than its dense one, whatever computed that. steps: seconds
        of a dense and of a sparse one. With one sparse step there is nothing to go by: clusters start from nothing in it."""
        if len(self.cold) < 2:
            return
        if (ratio := _ratio(steps[False], steps[True])) is not None and ratio <= 1:
            sparse, dense = (f"{steps[kind]:.2f}" for kind in (True, False))
            sentence = f"sparse steps were not faster than this run's dense steps: {sparse} s instead of {dense} s. {WHAT_HELPS}"
            self.remarks["steps_not_faster"] = Remark(sentence, {"sparse": sparse, "dense": dense})
        elif (ratio := _ratio(dense_ms, sparse_ms)) is not None and ratio <= 1:
            sparse, dense = f"{sparse_ms:.1f}", f"{dense_ms:.1f}"
            sentence = f"sparse attention was not faster than dense attention in this run: {sparse} ms instead of {dense} ms a call. {WHAT_HELPS}"
            self.remarks["calls_not_faster"] = Remark(sentence, {"sparse": sparse, "dense": dense})

    def _report(self, completed: bool, settings: dict[str, object]) -> RunReport:
        seconds: Counter[int] = Counter()
        for step, watch in self._watches:
            seconds[step] += watch.seconds()
        for device in {figures.density.device for *_, figures in self._unread}:  # one wait for each
            taken = self._take(device)
            self._learn(taken, iter(torch.stack(_known(taken)).tolist()))
        cells, values = self._cells, [value for cell in self._cells.values() for value in cell]
        indices = sorted(self._sigmas)
        by_step = {i: [v for (_, s), vs in cells.items() if s == i for v in vs] for i in indices}
        steps = [
            StepReport(i, self._sigmas[i], bool(by_step[i]), seconds[i], _mean_of("density", by_step[i])) for i in indices
        ]
        maps = {
            name: [[_mean_of(name, cells.get((b, i), [])) for i in indices] for b in self._labels] for name in Figures._fields
        }
        candidates = len(values) + sum(n for reason, n in self.dense.items() if reason not in _NOT_CANDIDATES)
        dense_ms, sparse_ms = _median_ms(self._dense_watches), _median_ms(self._sparse_watches)
        q_sizes, k_sizes = self.picture.sizes()
        # Steps that ran: another node may have skipped some, and an interruption cut the last one short.
        ran = {step for _, step in (*cells, *self._reasons)}
        whole = [step for step in steps if step.index in ran][: None if completed else -1]
        settled = {sparse: _median(_settled(whole, sparse)) for sparse in (False, True)}
        self._not_faster(settled, dense_ms, sparse_ms)
        return RunReport(
            tokens=self.tokens,
            density=_mean_of("density", values),
            text_share=self.text_share,
            error=_mean_of("error", values),
            error_by_block_and_step=maps["error"],
            expected_error_by_block_and_step=maps["expected_error"],
            cold_calls=sum(n for step, n in self.cold.items() if step > min(self.cold)),
            sparse_share=len(values) / candidates if candidates else 0.0,
            sparse_calls=len(values),
            dense_calls={r.value: n for r, n in self.dense.items() if r not in _NOT_CANDIDATES},
            backend=self.backend,
            steps=steps,
            block_labels=list(self._labels),
            density_by_block_and_step=maps["density"],
            seconds=time.perf_counter() - self.began,
            completed=completed,
            notices=[
                *(text for reason, text in self.notices.items() if not reason.expected),
                *(remark.sentence for remark in self.remarks.values()),
            ],
            reasons_by_block_and_step=[[self._reason(b, i) for i in indices] for b in self._labels],
            settings=settings,
            device=self.device,
            dense_call_ms=dense_ms,
            sparse_call_ms=sparse_ms,
            attention_speedup=_ratio(dense_ms, sparse_ms),
            step_speedup=_ratio(settled[False], settled[True]),
            q_cluster_sizes=q_sizes,
            k_cluster_sizes=k_sizes,
            overlays=self.picture.labels(),
            remarks=dict(self.remarks),
        )


def _number(value: float) -> float | None:
    """None for what is none: inputs that overflow leave no error to speak of."""
    return value if math.isfinite(value) else None


def _mean_of(name: str, cell: list[Figures]) -> float | None:
    """Mean of the calls' figures of a name, as far as they have it."""
    return _mean([value for figures in cell if (value := getattr(figures, name)) is not None])


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _settled(steps: list[StepReport], sparse: bool) -> list[float]:
    """Seconds of the steps of a kind, less a run's first step: the model is still on its way to the GPU then."""
    return [step.seconds for step in steps[1:] if step.sparse == sparse]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _median_ms(watches) -> float | None:
    """Median milliseconds of the regions that were left."""
    return _median([1000 * seconds for watch in watches if (seconds := watch.seconds()) > 0])


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


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
