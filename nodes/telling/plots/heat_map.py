"""Density, or error, by block and step: colour where attention ran sparse, hatching where it ran dense."""

from ....svg2_core.stats import RunReport
from . import reasons
from .canvas import Canvas
from .scales import every, nice_top, percent, readable_on, tick_percent, viridis

TICK = 18  # font size
TITLE = 22


def edges(start: float, end: float, count: int) -> list[int]:
    """Pixel positions of the edges of `count` cells between start and end, the cells of one size unless tiny."""
    size = (end - start) / max(1, count)
    size = int(size) if size >= 4 else size
    return [round(start + i * size) for i in range(count + 1)]


def cells_of(report: RunReport, what: str) -> list[list[float | None]]:
    """By block and step. what: "density" or "error"."""
    return getattr(report, f"{what}_by_block_and_step")


def top_of(report: RunReport, what: str) -> float:
    """The end of the scale: the largest of the run, rounded up. Most of 0..1 would go unused."""
    cells = [cell for row in cells_of(report, what) for cell in row if cell is not None]
    return min(1.0, nice_top(max(cells, default=1.0)))


def reason_of(report: RunReport, row: int, column: int) -> str | None:
    """Why the cell is dense; None where it is not, or where the block was not seen in that step."""
    rows = report.reasons_by_block_and_step
    return rows[row][column] if rows else None


def draw_heat_map(canvas: Canvas, report: RunReport, xs: list[int], ys: list[int], what: str = "density") -> None:
    """Fill the cells between the pixel positions xs (steps) and ys (blocks), with tick labels left and below."""
    top = top_of(report, what)
    gap = 1 if min(xs[1] - xs[0], ys[1] - ys[0]) >= 12 else 0
    for row, values in enumerate(cells_of(report, what)):
        for column, value in enumerate(values):
            box = (xs[column], ys[row], xs[column + 1] - gap, ys[row + 1] - gap)
            reason = reason_of(report, row, column)
            if value is not None:
                color = viridis(value / top)
                canvas.box(box, color)
                words = percent(value, top)
                if box[2] - box[0] >= canvas.width_of(words, TICK) + 8 and box[3] - box[1] >= TICK + 4:
                    canvas.text((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, words, TICK, readable_on(color), "mm")
            elif reason is not None:
                # Without gaps, so that neighbours read as one region.
                color = canvas.theme.warning if reasons.is_fallback(reason) else None
                canvas.hatch((xs[column], ys[row], xs[column + 1], ys[row + 1]), reasons.pattern(reason), color)
    canvas.frame((xs[0], ys[0], xs[-1], ys[-1]), canvas.theme.grid)

    labels = report.block_labels
    for i in every(len(labels), (ys[-1] - ys[0]) // (TICK + 6)):
        canvas.text(xs[0] - 8, (ys[i] + ys[i + 1]) / 2, labels[i], TICK, canvas.theme.muted, "rm", width=90)
    draw_steps_axis(canvas, report, xs, ys[-1])


def draw_steps_axis(canvas: Canvas, report: RunReport, xs: list[int], y: float) -> None:
    """Step numbers, from 1, under a plot that ends at y."""
    shown = every(len(report.steps), (xs[-1] - xs[0]) // 44)
    for i in shown:
        canvas.text((xs[i] + xs[i + 1]) / 2, y + 6, str(report.steps[i].index + 1), TICK, canvas.theme.muted, "ma")
    canvas.text(xs[-1] + 14, y + 6, "step", TICK, canvas.theme.muted, "la")


def draw_scale(canvas: Canvas, report: RunReport, box, what: str = "density") -> None:
    """The colour bar."""
    left, top, right, bottom = box
    end = top_of(report, what)
    for y in range(round(top), round(bottom)):
        canvas.box((left, y, right, y + 1), viridis((bottom - 1 - y) / max(1, bottom - top - 1)))
    for share in (0.0, 0.5, 1.0) if bottom - top >= 100 else (0.0, 1.0):
        anchor = {0.0: "ls", 1.0: "la"}.get(share, "lm")
        y = bottom - share * (bottom - top)
        canvas.text(right + 8, y, tick_percent(share * end), TICK, canvas.theme.muted, anchor)


def draw_legend(canvas: Canvas, report: RunReport, right: float, y: float, most: float) -> None:
    """What each hatching in the map means, right-aligned in the line at y, at most `most` pixels wide."""
    seen = {r for row in report.reasons_by_block_and_step for r in row if r is not None}
    names = [name for name in report.dense_calls if name in seen] or sorted(seen)
    entries = [
        (reasons.pattern(n), reasons.words(n), reasons.is_fallback(n)) for n in names if not reasons.is_fallback(n)
    ]
    fallbacks = [reasons.words(n) for n in names if reasons.is_fallback(n)]
    if fallbacks:
        entries.append((reasons.FALLBACK, ", ".join(fallbacks), True))
    start = right - min(most, sum(30 + canvas.width_of("dense: " + words, TICK) + 22 for _, words, _ in entries) - 22)
    for pattern, words, warn in entries:
        color = canvas.theme.warning if warn else None
        canvas.hatch((start, y, start + 22, y + TICK), pattern, color)
        canvas.frame((start, y, start + 22, y + TICK), canvas.theme.grid)
        start += 30
        start += canvas.text(start, y, "dense: " + words, TICK, color or canvas.theme.muted, width=right - start) + 22
