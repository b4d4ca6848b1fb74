"""Compile the kernels of norms and rotary embedding ahead of time, as the models call them.

    python tests/kernels/compile_norm_rope.py 80 90      (not under TRITON_INTERPRET)

One JSON line per kernel, call and architecture; see compile_ahead.py.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import triton
from compile_ahead import compile_for, load_pack, source
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parent))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def calls(arch: int):
    """The models' calls at 720p, by name: two that have both kernels, the others for those that differ most, the rarer ones for one."""
    from svg2_pack.svg2_core.ops.norm_rope import layer_norm, rms_norm, rms_norm_rotary, rotary

    def x(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype)

    def queries(n, h, d, dtype=BF16):  # one third of a fused projection
        return x(1, n, 3, h, d, dtype=dtype)[:, :, 0].transpose(1, 2)

    def table(n, d):
        return x(1, 1, n, d // 2, 2, 2, dtype=FP32)

    plain = {"eps": 1e-6, "backend": "triton"}
    yield (
        "Wan 14B modulation",
        lambda: layer_norm(x(1, 75_600, 5120), factor=x(1, 1, 5120), shift=x(1, 1, 5120), **plain),
    )
    yield "Wan 14B queries", lambda: rms_norm_rotary(
        x(1, 75_600, 40, 128).transpose(1, 2), x(5120), table(75_600, 128), over="token", pairs="interleaved",
        out=x(1, 75_600, 40, 128).transpose(1, 2), **plain)  # fmt: skip
    if arch not in (86, 90):
        return
    yield "HunyuanVideo queries", lambda: rms_norm_rotary(
        queries(118_800, 24, 128), x(128), table(118_800, 128), over="head", pairs="interleaved", **plain)  # fmt: skip
    yield "Cosmos queries", lambda: rms_norm_rotary(
        queries(56_320, 32, 128, FP16), x(128, dtype=FP16), table(56_320, 128), over="head", pairs="halves", **plain)  # fmt: skip
    yield "cross-attention norm", lambda: rms_norm(x(1, 75_600, 5120), x(5120), **plain)
    if arch == 86:
        yield "Wan 1.3B, affine", lambda: layer_norm(x(1, 32_760, 1536, dtype=FP16), x(1536), x(1536), **plain)
        yield "Wan 5B, tokens' modulation", lambda: layer_norm(
            x(1, 27_280, 3072), factor=x(1, 27_280, 3072), shift=x(1, 27_280, 3072), **plain)  # fmt: skip
        yield "heads of 64", lambda: rms_norm(queries(4096, 24, 64), x(64), **plain)
        yield "LTX queries", lambda: rms_norm_rotary(
            x(1, 4096, 32, 64).transpose(1, 2), x(2048), x(1, 4096, 32, 32, 2, 2, dtype=FP32).transpose(1, 2),
            over="token", pairs="halves", **plain)  # fmt: skip
        yield "odd sizes", lambda: rotary(queries(4097, 3, 80, FP32), table(4097, 80), pairs="halves", backend="triton")
        yield (
            "fp32 row",
            lambda: layer_norm(x(3, 4097, 5120, dtype=FP32), eps=1e-6, factor=x(3, 1, 5120), backend="triton"),
        )


def wide(launch, arch: int) -> dict:
    """Loads and stores of 16 bytes a thread; the kernel is in Triton's cache by now."""
    ptx = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options).asm["ptx"]
    return {
        f"wide_{kind}s": len(re.findall(rf"{letters}\.global\S*\.v4\.b32", ptx))
        for kind, letters in (("load", "ld"), ("store", "st"))
    }


def main() -> None:
    load_pack()
    import launches

    for arch in map(int, sys.argv[1:]):
        for name, call in calls(arch):
            with pytest.MonkeyPatch.context() as monkeypatch, launches.record(monkeypatch) as recording:
                call()
            for launch in recording.launches:
                grid = [int(size) for size in (*launch.grid, 1, 1)[:3]]
                print(
                    json.dumps({"call": name, "grid": grid, **compile_for(launch, arch), **wide(launch, arch)}),
                    flush=True,
                )


if __name__ == "__main__":
    main()
