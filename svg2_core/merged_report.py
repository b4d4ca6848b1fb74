"""One report of a run that several processes made, each with a share of the heads or of the conditionings."""

from dataclasses import replace
from itertools import chain

from .reasons import Reason
from .stats import RunReport


def merge(reports: dict[str, RunReport | None]) -> RunReport | None:
    """reports: by the name of the process, such as "GPU 0"; None: it has none. -> None where none has one.

    Calls are added up; densities and errors are means over them, weighed by sparse calls; steps, and what calls take, are the slowest
    process'; clusters and pictures those of the first that has any. What only some tell is told with their names.
    """
    known = {name: report for name, report in reports.items() if report is not None}
    if not known:
        return None
    first, *_ = all_ = list(known.values())
    labels = list(dict.fromkeys(chain.from_iterable(report.block_labels for report in all_)))
    indices = sorted({step.index for report in all_ for step in report.steps})
    sparse = [report.sparse_calls for report in all_]
    candidates = sum(report.sparse_calls / report.sparse_share for report in all_ if report.sparse_share)
    candidates += sum(sum(report.dense_calls.values()) for report in all_ if not report.sparse_share)
    maps = {
        name: [[_mean([_cell(report, name, label, index) for report in all_]) for index in indices] for label in labels]
        for name in ("density_by_block_and_step", "error_by_block_and_step", "expected_error_by_block_and_step")
    }
    reasons = "reasons_by_block_and_step"
    slowest = max(all_, key=lambda report: report.sparse_call_ms or 0.0)
    pictured = next((report for report in all_ if report.q_cluster_sizes), first)
    dense = {name: sum(report.dense_calls.get(name, 0) for report in all_) for name in chain.from_iterable(r.dense_calls for r in all_)}
    return replace(
        first,
        tokens=max(report.tokens for report in all_),
        density=_mean([report.density for report in all_], sparse),
        error=_mean([report.error for report in all_], sparse),
        text_share=max(report.text_share for report in all_),
        sparse_share=sum(sparse) / candidates if candidates else 0.0,
        sparse_calls=sum(sparse),
        dense_calls=dense,
        cold_calls=sum(report.cold_calls for report in all_),
        backend=next((report.backend for report in all_ if report.backend), None),
        steps=[_step([step for report in all_ for step in report.steps if step.index == index]) for index in indices],
        block_labels=labels,
        reasons_by_block_and_step=[
            [next((name for report in all_ if (name := _cell(report, reasons, label, index))), None) for index in indices] for label in labels
        ],
        seconds=max(report.seconds for report in all_),
        **{name: getattr(slowest, name) for name in ("dense_call_ms", "sparse_call_ms", "attention_speedup")},
        step_speedup=min((report.step_speedup for report in all_ if report.step_speedup), default=None),
        **{name: getattr(pictured, name) for name in ("q_cluster_sizes", "k_cluster_sizes", "overlays")},
        completed=all(report.completed for report in reports.values() if report) and len(known) == len(reports),
        notices=_notices(reports),
        remarks={name: remark for report in reversed(all_) for name, remark in report.remarks.items()},
        devices=[f"{name}: {_line(report)}" for name, report in reports.items()],
        **maps,
    )


def _cell(report: RunReport, name: str, label: str, index: int):
    """What a map of the report says of a block in a step, None where it says nothing."""
    rows = getattr(report, name)
    row = report.block_labels.index(label) if label in report.block_labels else len(rows)
    column = next((i for i, step in enumerate(report.steps) if step.index == index), None)
    return rows[row][column] if row < len(rows) and column is not None else None


def _mean(values: list[float | None], weights: list[int] | None = None) -> float | None:
    pairs = [(value, weight) for value, weight in zip(values, weights or [1] * len(values), strict=True) if value is not None]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _step(steps: list):
    density = _mean([step.density for step in steps])
    return replace(steps[0], sparse=any(step.sparse for step in steps), seconds=max(step.seconds for step in steps), density=density)


def _notices(reports: dict[str, RunReport | None]) -> list[str]:
    told = list(dict.fromkeys(chain.from_iterable(report.notices for report in reports.values() if report)))
    lines = []
    for sentence in told:
        names = [name for name, report in reports.items() if report and sentence in report.notices]
        lines.append(sentence if len(names) == len(reports) else f"{', '.join(names)}: {sentence}")
    silent = [name for name, report in reports.items() if report is None]
    return [*lines, *([f"{', '.join(silent)}: no report of this run"] if silent else [])]


def _line(report: RunReport | None) -> str:
    """What one process did, in a line."""
    if report is None:
        return "no report of this run"
    unexpected = {name: count for name, count in report.dense_calls.items() if not Reason(name).expected}
    dense = "".join(f", {name} {count}" for name, count in unexpected.items())
    if not report.sparse_calls:
        return f"every call ran dense{dense}"
    error = "" if report.error is None else f", attention error {report.error:.1%}"
    return f"density {report.density:.1%}{error}, {report.sparse_calls} sparse calls, backend {report.backend}{dense}"
