"""A stopwatch of time spent in a region, which does not wait for the device while it runs."""

import time
from collections.abc import Callable
from typing import Any

import torch


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


def timed(watch: Stopwatch | None, compute: Callable[[], Any]) -> Any:
    """What `compute` returns; the watch, if there is one, is stopped then, and where it fails."""
    try:
        return compute()
    finally:
        if watch is not None:
            watch.stop()
