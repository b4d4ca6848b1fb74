"""The pages of a report: what ran, how far it is from dense, what the clusters look like, or why there is nothing to see."""

import torch

from ....svg2_core.stats import RunReport
from .canvas import THEMES, Canvas
from .heat_map import TICK, TITLE, draw_heat_map, draw_legend, draw_scale, edges
from .histogram import draw_histogram, draw_key
from .overlay import draw_overlay
from .steps import draw_density, draw_error, draw_seconds

WIDTH, HEIGHT, MARGIN = 1280, 960, 40  # pixels: readable in a node's preview, where it is shown at about half its size


def empty_page(sentences: list[str], theme: str) -> Canvas:
    """A page that says why there is nothing to draw."""
    canvas = Canvas(WIDTH, HEIGHT // 3, THEMES[theme])
    canvas.text(MARGIN, 32, "SVG2 report", 32)
    y = 96
    for sentence in sentences:
        y = canvas.paragraph(MARGIN, y, sentence, WIDTH - 2 * MARGIN, 22) + 6
    return canvas


def _header(canvas: Canvas, title: str, lines: list[str], warnings: list[str]) -> float:
    """-> the y below it."""
    canvas.text(MARGIN, 24, title, 32)
    y = 70
    for i, line in enumerate(lines):
        canvas.text(
            MARGIN, y, line, TITLE if i == 0 else TICK, None if i == 0 else canvas.theme.muted, width=WIDTH - 2 * MARGIN
        )
        y += 30 if i == 0 else 26
    for line in warnings[:2]:
        canvas.text(MARGIN, y, line, TICK, canvas.theme.warning, width=WIDTH - 2 * MARGIN)
        y += 26
    return y


def run_page(report: RunReport, lines: list[str], warnings: list[str], theme: str) -> Canvas:
    """Heat map of density by block and step, and under it, on the same axis, density and seconds of each step."""
    canvas = Canvas(WIDTH, HEIGHT, THEMES[theme])
    top = _header(canvas, "SVG2 report: what ran sparse", lines, warnings) + 22
    plots = [("density of the sparse calls", draw_density)] if report.sparse_calls else []
    _by_step(canvas, report, top, "density", [*plots, ("seconds per step", draw_seconds)])
    return canvas


def error_page(report: RunReport, sentence: str, theme: str) -> Canvas:
    """Heat map of the attention's error by block and step, and under it the mean of each step."""
    canvas = Canvas(WIDTH, HEIGHT, THEMES[theme])
    canvas.text(MARGIN, 24, "SVG2 report: how far from dense", 32)
    top = canvas.paragraph(MARGIN, 70, sentence, WIDTH - 2 * MARGIN, TICK, canvas.theme.muted) + 12
    _by_step(canvas, report, top, "error", [("attention error of the sparse calls", draw_error)])
    return canvas


def _by_step(canvas: Canvas, report: RunReport, top: float, what: str, plots: list) -> None:
    """A map by block and step from `top` on, and below it plots over the same steps."""
    left, right = MARGIN + 100, WIDTH - MARGIN - 100
    xs = edges(left, min(right, left + 250 * len(report.steps)), len(report.steps))
    if not report.block_labels:
        canvas.text(left, top + 30, "No video self-attention was seen.", TITLE, canvas.theme.muted)
        top += 80
    else:
        used = canvas.text(MARGIN, top, f"{what} by block and step", TITLE)
        draw_legend(canvas, report, WIDTH - MARGIN, top + 3, WIDTH - 2 * MARGIN - used - 30)
        top += 38
        # Few blocks leave the room to the plots below.
        ys = edges(top, top + min(HEIGHT - 340 - top, 64 * len(report.block_labels)), len(report.block_labels))
        draw_heat_map(canvas, report, xs, ys, what)
        if report.sparse_calls:
            draw_scale(canvas, report, (xs[-1] + 28, ys[0], xs[-1] + 48, ys[-1]), what)
        canvas.upright_text(MARGIN - 14, (ys[0] + ys[-1]) / 2, "block", TICK)
        top = ys[-1] + 38
    height = min(180, (HEIGHT - 24 - top) / len(plots) - 68)
    for title, draw in plots:
        canvas.text(MARGIN, top, title, TITLE)
        draw(canvas, report, xs, top + 40, top + 40 + height - 6)
        top += height + 68


def clusters_page(
    report: RunReport, block: str | None, sentence: str, images: torch.Tensor | None, theme: str
) -> Canvas:
    """Clusters of one block over the frames, and cluster sizes.

    block: its label, None where there are no clusters to show; sentence: what is shown, or why nothing is.
    """
    canvas = Canvas(WIDTH, HEIGHT, THEMES[theme])
    canvas.text(MARGIN, 24, "SVG2 report: clusters", 32)
    y = canvas.paragraph(MARGIN, 70, sentence, WIDTH - 2 * MARGIN, TICK, canvas.theme.muted) + 8
    floor = HEIGHT - 250 if report.q_cluster_sizes else HEIGHT - MARGIN
    if block is not None:
        draw_overlay(canvas, report.overlays[block], images, (MARGIN, y, WIDTH - MARGIN, floor - 10))
    if report.q_cluster_sizes:
        canvas.text(MARGIN, floor, "how large the clusters are", TITLE)
        draw_key(canvas, WIDTH - MARGIN, floor + 3)
        draw_histogram(
            canvas,
            report.q_cluster_sizes,
            report.k_cluster_sizes,
            (MARGIN + 50, floor + 50, WIDTH - MARGIN, HEIGHT - 70),
        )
        canvas.upright_text(MARGIN - 14, HEIGHT - 135, "clusters", TICK)
        canvas.text(
            WIDTH - MARGIN,
            HEIGHT - 14,
            "tokens in a cluster; all heads and blocks, last sparse step",
            TICK,
            canvas.theme.muted,
            "rs",
        )
    return canvas
