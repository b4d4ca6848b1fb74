"""From numbers to colours, ticks and words."""

import math

import numpy as np

# Eleven points of viridis (van der Walt & Smith 2015): even steps to the eye, for colour-blind eyes and in grey too.
_VIRIDIS = (
    "440154",
    "482475",
    "414487",
    "355f8d",
    "2a788e",
    "21918c",
    "22a884",
    "44bf70",
    "7ad151",
    "bddf26",
    "fde725",
)
_POINTS = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _VIRIDIS], dtype=float)


def viridis(value: float) -> tuple[int, int, int]:
    """RGB 0..255 of a value in 0..1; values outside take the colour of the end."""
    at = min(max(value, 0.0), 1.0) * (len(_POINTS) - 1)
    return tuple(round(float(np.interp(at, range(len(_POINTS)), _POINTS[:, channel]))) for channel in range(3))


def readable_on(color: tuple[int, int, int]) -> str:
    """Black or white, whichever is easier to read on the colour."""
    red, green, blue = color
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "#ffffff"


def nice_top(largest: float) -> float:
    """The end of an axis from 0 that holds `largest`: a round number; 1 where there is nothing to show."""
    if not largest > 0 or math.isinf(largest):
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    return next(m * unit for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 20) if m * unit >= largest * (1 - 1e-9))


def every(count: int, most: int) -> list[int]:
    """Indices 0..count-1 that get a tick label: at most `most`, evenly spaced in round steps, the first among them."""
    steps = (m * 10**e for e in range(9) for m in (1, 2, 5))
    step = next(s for s in steps if math.ceil(count / s) <= max(1, most))
    return list(range(0, count, step))


def percent(share: float, top: float = 1.0) -> str:
    """A share in percent, with one digit after the point where the axis it stands on is short."""
    return f"{100 * share:.1f}%" if top < 0.03 else f"{100 * share:.0f}%"


def tick_percent(share: float) -> str:
    """A tick of an axis in percent, in full: 7.5% is not 8%."""
    return f"{100 * share:.3g}%"


def seconds(value: float) -> str:
    """Seconds, or milliseconds where that reads better."""
    if value == 0:
        return "0"
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def count(value: float) -> str:
    """A number of things in at most four characters or so: 950, 12k, 3.4M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}"
