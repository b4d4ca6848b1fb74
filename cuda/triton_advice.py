"""The Triton that belongs to a torch, and how to get it. Advice only: the pack installs none, because any Triton takes the place
of the one that is there, and those for AMD and Intel GPUs have the same import name.

Standard library only: install.py says it too.
"""

from __future__ import annotations

import os
import re

# torch -> Triton. Of Linux by the requirements of torch's own wheels; triton-windows takes over the numbers, and its README
# says the same up to 2.10.
PAIRS = {
    (2, 6): (3, 2), (2, 7): (3, 3), (2, 8): (3, 4), (2, 9): (3, 5), (2, 10): (3, 6), (2, 11): (3, 6), (2, 12): (3, 7),
    (2, 13): (3, 7), (2, 14): (3, 8),
}  # fmt: skip


def how_to_get(torch: str | None, least: tuple[int, ...] = (0,), windows: bool = os.name == "nt") -> str:
    """What to do for a Triton that belongs to this version of torch and is not older than `least`. Beside a CUDA build only.

    `pip install torch`, where torch is there, leaves it alone and installs what it asks for and does not find: on Linux,
    the one Triton that it was made with. Builds for Windows ask for none.
    """
    numbers = re.match(r"(\d+)\.(\d+)", torch or "")
    installed = tuple(map(int, numbers.groups())) if numbers else (0, 0)
    pair = PAIRS.get(installed)
    if installed > max(PAIRS):
        return f"install the triton-windows that was made for torch {torch}" if windows else "pip install torch, which brings its Triton"
    if pair is None or least[:2] > pair:
        return "update torch, then run SVG2 Doctor, which says which triton-windows it needs" if windows else "update torch, which brings its Triton"
    if not windows:
        return "pip install torch, which brings its Triton"
    return f'pip install "{windows_pin(pair, least)}"'


def windows_pin(pair: tuple[int, int], least: tuple[int, ...] = (0,)) -> str:
    """The requirement for the releases of this minor version of triton-windows that are not older than `least`."""
    above = ".".join(map(str, max(pair, _short(least))))
    return f"triton-windows>={above},<{pair[0]}.{pair[1] + 1}"


def _short(version: tuple[int, ...]) -> tuple[int, ...]:
    return version[:2] if version[2:] == (0,) else version
