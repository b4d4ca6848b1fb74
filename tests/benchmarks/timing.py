"""Time work on a device: warmed up, over fresh inputs, by events on its own clock."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds at the 20th, 50th and 80th percentile; MiB that a call takes at its peak beside what it is given."""

    p20: float
    p50: float
    p80: float
    extra_mib: float | None


def measure(call: Callable, inputs: list[tuple], seconds: float = 1.0, least: int = 5) -> Timing:
    """Time `call(*inputs[i])`, going round the inputs, for about `seconds` and at least `least` times."""
    device = next(x.device for x in inputs[0] if isinstance(x, torch.Tensor))
    run = _on_gpu if device.type == "cuda" else _on_cpu
    for arguments in inputs[:2]:
        call(*arguments)
    first = run(call, inputs[0], device)
    extra = _peak(call, inputs[0], device) if device.type == "cuda" else None
    repeats = max(least, min(200, int(1000 * seconds / max(first, 1e-3))))
    times = torch.tensor([run(call, inputs[i % len(inputs)], device) for i in range(repeats)], dtype=torch.float64)
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(p20, p50, p80, extra)


def _on_gpu(call, arguments, device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Fill the queue first: the host then prepares the launches while the device is busy, as it does inside a model.
    torch.cuda._sleep(20_000_000)  # cycles, about ten milliseconds
    start.record()
    call(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _on_cpu(call, arguments, device) -> float:
    began = time.perf_counter()
    call(*arguments)
    return 1000 * (time.perf_counter() - began)


def _peak(call, arguments, device) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call(*arguments)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak / 2**20


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device does in this process: bf16 FLOP/s of a large product, bytes/s of a copy (read plus written)."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = measure(torch.mm, [(a, b)]).p50 / 1000
    x = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)
    copy = measure(lambda x, y: y.copy_(x), [(x, y)]).p50 / 1000
    return {"flops": 2 * 8192**3 / product, "bandwidth": 2 * x.nbytes / copy}
