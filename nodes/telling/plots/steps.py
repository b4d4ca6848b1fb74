"""Density, error and seconds of each step, under the heat map and on its axis."""

import statistics

from ....svg2_core.stats import RunReport
from . import reasons
from .canvas import Canvas
from .heat_map import TICK, cells_of, draw_steps_axis, reason_of, top_of
from .scales import nice_top, seconds, tick_percent, viridis


def step_reason(report: RunReport, column: int) -> str:
    """Why a step without sparse calls was dense: the reason most of its blocks give."""
    found = [r for row in range(len(report.block_labels)) if (r := reason_of(report, row, column)) is not None]
    return statistics.mode(found) if found else ""


def _dense_bar(canvas: Canvas, report: RunReport, column: int, box) -> None:
    reason = step_reason(report, column)
    color = canvas.theme.warning if reason and reasons.is_fallback(reason) else None
    canvas.hatch(box, reasons.pattern(reason) if reason else "rising", color)


def _axis(canvas: Canvas, xs: list[int], top: float, bottom: float, end: str, middle: str) -> None:
    """Grid lines and labels at 0, the middle and the end of the scale."""
    shown = [(bottom, "0", "rs"), (top, end, "rm")] + (
        [((top + bottom) / 2, middle, "rm")] if bottom - top >= 70 else []
    )
    for y, words, anchor in shown:
        canvas.box((xs[0], y, xs[-1], y + 1), canvas.theme.grid)
        canvas.text(xs[0] - 8, y, words, TICK, canvas.theme.muted, anchor)


def _bar(xs: list[int], column: int) -> tuple[int, int]:
    gap = max(1, (xs[column + 1] - xs[column]) // 8) if xs[column + 1] - xs[column] >= 4 else 0
    return xs[column], xs[column + 1] - gap


def draw_density(canvas: Canvas, report: RunReport, xs: list[int], top: float, bottom: float) -> None:
    """Mean density of each step's sparse calls; a step that was dense throughout is hatched."""
    _draw_shares(canvas, report, xs, top, bottom, [step.density for step in report.steps], top_of(report, "density"))


def draw_error(canvas: Canvas, report: RunReport, xs: list[int], top: float, bottom: float) -> None:
    """Mean attention error of each step's sparse blocks; a step that was dense throughout is hatched."""
    columns = zip(*cells_of(report, "error"), strict=True)
    known = [[cell for cell in column if cell is not None] for column in columns]
    means = [statistics.mean(cells) if cells else None for cells in known]
    _draw_shares(canvas, report, xs, top, bottom, means, top_of(report, "error"))


def _draw_shares(canvas, report, xs, top, bottom, shares: list[float | None], end: float) -> None:
    _axis(canvas, xs, top, bottom, tick_percent(end), tick_percent(end / 2))
    for column, share in enumerate(shares):
        left, right = _bar(xs, column)
        if share is None:
            _dense_bar(canvas, report, column, (left, top, right, bottom))
        else:
            canvas.box((left, bottom - (bottom - top) * min(1.0, share / end), right, bottom), viridis(share / end))
    draw_steps_axis(canvas, report, xs, bottom)


def draw_seconds(canvas: Canvas, report: RunReport, xs: list[int], top: float, bottom: float) -> None:
    """Seconds of each step; a step that took far longer than the others is cut off and labelled."""
    times = [step.seconds for step in report.steps]
    usual = 3 * statistics.median(times)
    end = nice_top(min(max(times), usual) if usual > 0 else max(times))
    _axis(canvas, xs, top, bottom, seconds(end), seconds(end / 2))
    for column, step in enumerate(report.steps):
        left, right = _bar(xs, column)
        box = (left, bottom - (bottom - top) * min(1.0, step.seconds / end), right, bottom)
        if step.sparse:
            canvas.box(box, canvas.theme.series[0])
        else:
            _dense_bar(canvas, report, column, box)
        if step.seconds > end:
            canvas.box((left, top + 5, right, top + 8), canvas.theme.background)
            if step.seconds == max(times):  # the others would write over each other
                canvas.text(right + 6, top + 4, seconds(step.seconds), TICK - 2)
    draw_steps_axis(canvas, report, xs, bottom)
