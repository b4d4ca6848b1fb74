"""How large the clusters are."""

from .canvas import Canvas
from .heat_map import TICK
from .scales import count, nice_top


def size_range(entry: int) -> str:
    """The tokens of a cluster that `entry` of the histogram counts: "0", "1", "2-3", "512-1k", "1k-2k" (k: 1024)."""
    if entry < 2:
        return str(entry)
    low, end = 2 ** (entry - 1), 2**entry
    first = str(low) if low < 1024 else f"{low // 1024}k"
    return f"{first}-{end - 1}" if end < 1024 else f"{first}-{end // 1024}k"


def draw_histogram(canvas: Canvas, queries: list[int], keys: list[int], box) -> None:
    """Bars of query and key clusters beside each other by size, in powers of two, over all heads and blocks."""
    left, top, right, bottom = box
    bins = max(len(queries), len(keys))
    first = 0 if (queries or [0])[0] or (keys or [0])[0] else 1  # no column for empty clusters where there are none
    end = nice_top(max([*queries, *keys]))
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        canvas.box((left, y, right, y + 1), canvas.theme.grid)
        canvas.text(left - 8, y, count(share * end), TICK, canvas.theme.muted, "rm")
    width = min(96, (right - left) / max(1, bins - first))
    for entry in range(first, bins):
        x = left + (entry - first) * width
        for i, series in enumerate((queries, keys)):
            value = series[entry] if entry < len(series) else 0
            start = x + width * (0.1 + 0.4 * i)
            canvas.box(
                (start, bottom - (bottom - top) * value / end, start + 0.4 * width - 1, bottom), canvas.theme.series[i]
            )
        canvas.text(
            x + width / 2, bottom + 6, size_range(entry), TICK if width >= 76 else TICK - 3, canvas.theme.muted, "ma"
        )


def draw_key(canvas: Canvas, right: float, y: float) -> None:
    """Which bars are whose, right-aligned in the line at y."""
    names = ("query clusters", "key clusters")
    x = right - sum(26 + canvas.width_of(name, TICK) + 22 for name in names) + 22
    for name, color in zip(names, canvas.theme.series, strict=True):
        canvas.box((x, y + 1, x + TICK, y + TICK + 1), color)
        x += 26
        x += canvas.text(x, y, name, TICK, canvas.theme.muted) + 22
