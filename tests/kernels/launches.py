"""The launch path of a sparse call at full size, without a GPU: fake tensors, kernels recorded instead of run.

A fake tensor has a shape but no values, so anything that would wait for the device to read one raises.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Launch:
    """One kernel launch as its caller made it. args: by parameter name; a tensor's dtype stands for it, to keep none alive."""

    kernel: object
    grid: tuple
    args: dict
    options: dict


@dataclass
class Recording:
    launches: list[Launch] = field(default_factory=list)
    peak_bytes: int = 0
    torch_launches: int = 0  # of torch's own operations, those that are no view and only make room excepted


class _Memory(TorchDispatchMode):
    """Highest sum of the storages that were made inside and are still alive."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording, self.live = recording, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not _is_view(func) and not func.name().startswith(("aten::empty", "prim::")):
            self.recording.torch_launches += 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not func._schema.is_mutable and not _is_view(func):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.recording.peak_bytes = max(self.recording.peak_bytes, sum(size for _, size in self.live.values()))
        return result


def _is_view(func) -> bool:
    return any(a.alias_info is not None for a in func._schema.returns)


OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@contextmanager
def record(monkeypatch):
    """Record every Triton launch and the memory of every tensor made inside; nothing runs."""
    import triton.runtime
    from triton.runtime.interpreter import InterpretedFunction

    recording = Recording()

    def run(self, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        args = dict(zip(self.arg_names, args, strict=False)) | kwargs
        args = {name: a.dtype if isinstance(a, torch.Tensor) else a for name, a in args.items()}
        recording.launches.append(Launch(self, grid, args, options))

    monkeypatch.setattr(triton.runtime.JITFunction, "run", run)
    monkeypatch.setattr(InterpretedFunction, "run", run, raising=False)  # Triton 3.3 and 3.4 have none, and need none
    with FakeTensorMode() as fake, _Memory(recording):
        recording.fake = fake
        yield recording


def sparse_call(recording, *, b=1, h=40, n=75_600, d=128, dtype=torch.bfloat16, text=0, bias=False, heads_at_a_time=None, **settings):
    """One warm sparse call of the Triton backend with the Wan 720p cluster counts; inputs do not count as its memory."""
    from svg2_pack.svg2_core import Layout, SVG2Config, svg2_attention
    from svg2_pack.svg2_core.cache import Centroids

    config = SVG2Config(**{"q_clusters": 300, "k_clusters": 1000, "density": 0.05, **settings})
    q, k, v = (torch.empty(b, n + text, h, d, dtype=dtype).transpose(1, 2) for _ in range(3))
    out_bytes = q.nbytes
    rank = min(config.metric_directions, d)
    shapes = [(c, rank or d) for c in config.cluster_counts(n)] + [(d, rank)] * (2 if rank else 0)
    warm = [Centroids(*(torch.empty(h, *shape, dtype=torch.float16) for shape in shapes)) for _ in range(b)]
    layout = Layout(0, n, torch.empty(b, text) if bias else None)
    before, recording.torch_launches = recording.peak_bytes, 0
    result = svg2_attention(q, k, v, layout, config, warm, backend="triton", heads_at_a_time=heads_at_a_time or h)
    return result, recording.peak_bytes - before - out_bytes
