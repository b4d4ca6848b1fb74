"""What launching a sparse call costs the host, without a GPU: Triton's own way from a call of a kernel to the driver, where a driver
that does nothing stands in for CUDA's.

    python tests/kernels/launch_cost.py      (not under TRITON_INTERPRET)

One JSON line per video size: launches, milliseconds of the process, and how many variants Triton would have compiled so far. Triton's
launcher in C and the driver (a few microseconds a launch) are not in the times; what torch's few operations do on a CPU is, so they
are taken at a small size.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from compile_ahead import load_pack
from triton.backends.compiler import GPUTarget

# tokens, heads, clusters of queries and keys, text: Wan 14B 720p, 1.3B and 14B 480p, HunyuanVideo 720p, Wan 5B 720p, the demo's
VIDEOS = (
    (75_600, 40, 300, 1000, 0), (32_760, 12, 200, 1000, 0), (32_760, 40, 200, 1000, 0), (118_800, 24, 376, 1000, 256),
    (27_280, 24, 180, 833, 0), (12_480, 12, 122, 381, 0),
)  # fmt: skip
TIMED = (1_560, 1, 20, 40, 0)  # so little that it is the host's own time
CALLS = 100


class Driver:
    """Stands in for CUDA's: a device to compile for, a stream, and nothing that runs."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Kernels:
    """Stands in for Triton's compiler; counts what it is asked for, by Triton's own key, and what is launched."""

    def __init__(self):
        self.variants, self.launches = [], 0

    def compile(self, function, key, *_, **__):
        def run(*_):
            self.launches += 1

        kernel = SimpleNamespace(run=run, function=None, packed_metadata=None, launch_metadata=lambda *_: None, result=lambda: None)
        caches = function.device_caches if hasattr(function, "device_caches") else function.cache
        caches[0][0][key] = kernel
        self.variants.append(function.fn.__name__)
        return kernel


def call_of(tokens: int, heads: int, q_clusters: int, k_clusters: int, text: int):
    """A warm sparse call of this size, as models make it; its inputs hold nothing."""
    from svg2_pack.svg2_core import Layout, SVG2Config, svg2_attention
    from svg2_pack.svg2_core.cache import Centroids

    config = SVG2Config(q_clusters=q_clusters, k_clusters=k_clusters, density=0.05)
    q, k, v = (torch.empty(1, tokens + text, heads, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    shapes = [(c, 32) for c in config.cluster_counts(tokens)] + [(128, 32)] * 2
    warm = [Centroids(*(torch.empty(heads, *shape, dtype=torch.float16) for shape in shapes))]
    return lambda: svg2_attention(q, k, v, Layout(0, tokens), config, warm, backend="triton", heads_at_a_time=heads)


def _milliseconds(call) -> float:
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def main() -> None:
    from triton.runtime.jit import JITFunction

    load_pack()
    kernels = Kernels()
    triton.runtime.driver.set_active(Driver())
    JITFunction._do_compile = lambda self, key, *args, **kwargs: kernels.compile(self, key)
    for video in (*VIDEOS, TIMED):
        call = call_of(*video)
        kernels.launches = 0
        call()
        row = {"tokens": video[0], "heads": video[1], "launches": kernels.launches, "variants": len(kernels.variants)}
        if video is TIMED:
            with torch.inference_mode():  # as the host calls it
                times = [_milliseconds(call) for _ in range(CALLS)]
            row |= {"median_ms": round(statistics.median(times), 2), "least_ms": round(min(times), 2)}
        print(json.dumps(row), flush=True)
    if "--names" in sys.argv:
        print({name: kernels.variants.count(name) for name in sorted(set(kernels.variants))})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
