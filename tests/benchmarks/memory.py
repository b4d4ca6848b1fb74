"""What a call takes at its peak beside what was there before it: by the kernel's high-water mark of this process (Linux)."""

from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_mib(call: Callable) -> float | None:
    """MiB at the peak of a call, its result included; None where the system does not tell."""
    try:
        _CLEAR.write_text("5")  # the mark falls to what is in use
        before = _mib("VmRSS")
        result = call()
        peak = _mib("VmHWM") - before
    except (OSError, StopIteration):
        return None
    del result
    return max(0.0, peak)


def _mib(name: str) -> float:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
