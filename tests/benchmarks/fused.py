"""Time norms, modulation and rotary embedding: plain torch, comfy_kitchen's kernels, and this pack's, against a copy.

    python tests/benchmarks/fused.py              all cases, 1k to 118,800 tokens; a few minutes
    python tests/benchmarks/fused.py --quick      only the length of each model's 720p video
    python tests/benchmarks/fused.py --model      no GPU needed: bytes, floors and expected times (--gpu names one)

Needs torch, triton, an NVIDIA GPU, and no ComfyUI; comfy_kitchen if it is to be compared. Rows are appended to
results/fused.csv (or --csv FILE). Where ours is the fastest on a GPU, it goes into svg2_core/ops/norm_rope/measured.py.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common

common.need_torch()

import floors  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import RESULTS, load_pack  # noqa: E402
from run import machine  # noqa: E402
from verify import WrongResult  # noqa: E402

TOKENS = (1_024, 4_096, 16_384, 32_760, 75_600, 118_800)
EPS = 1e-6
TARGET = 0.85  # of the bandwidth of a copy
EXPECTED = 0.85  # of it, from 16k tokens up
FIELDS = ("gpu", "driver", "torch", "triton", "commit", "date", "case", "tokens", "method", "p20_ms", "p50_ms", "p80_ms",
          "extra_mib", "bandwidth", "of_copy", "error")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One operation of a model. heads x width values per token; a norm over the token is over both.

    per_block: how often a block of that model runs it over the video's tokens. main: tokens of its 720p video.
    passes: times that plain torch, as the host writes it, moves a token's values, read or written; fp32 counts twice.
    """

    name: str
    kind: str  # "norm", "modulation" or "rotary"
    heads: int
    width: int
    per_block: int
    main: int
    passes: int
    over: str = "token"
    pairs: str = "interleaved"

    @property
    def values(self) -> int:
        return self.heads * self.width

    def bytes(self, tokens: int, size: int = 2) -> int:
        """Read once and written once, with the table of rotations (fp32, one for all heads) and the weights."""
        table = tokens * self.width // 2 * 4 * 4 if self.kind == "rotary" else 0
        return 2 * tokens * self.values * size + table + 2 * self.values * size

    def bytes_of_torch(self, tokens: int, size: int = 2) -> int:
        """What plain torch moves, an operation at a time."""
        return self.bytes(tokens, size) + (self.passes - 2) * tokens * self.values * size


# Wan: a block has two modulations, queries and keys of self-attention, and over the video's tokens two more norms.
# Passes of a modulation: norm 2, addcmul 2 (Cosmos: a product and a sum). Of a rotary embedding: norm 2, to fp32 3, two
# products and their sum 8 (Cosmos 11), back 3 (Cosmos 7: it reorders the halves before).
CASES = (
    Case("wan-14b modulation", "modulation", 1, 5120, 2, 75_600, 4),
    Case("wan-14b norm", "norm", 1, 5120, 2, 75_600, 2),
    Case("wan-14b q or k", "rotary", 40, 128, 2, 75_600, 16),
    Case("wan-5b norm", "norm", 1, 3072, 2, 27_280, 2),
    Case("wan-1.3b modulation", "modulation", 1, 1536, 2, 32_760, 4),
    Case("wan-1.3b q or k", "rotary", 12, 128, 2, 32_760, 16),
    Case("hunyuan modulation", "modulation", 1, 3072, 1, 118_800, 4),
    Case("hunyuan q or k", "rotary", 24, 128, 2, 118_800, 16, over="head"),
    Case("cosmos modulation", "modulation", 1, 4096, 3, 56_320, 6),
    Case("cosmos q or k", "rotary", 32, 128, 2, 56_320, 20, over="head", pairs="halves"),
    Case("heads of 64", "norm", 24, 64, 1, 16_384, 2, over="head"),
)


def inputs(case: Case, tokens: int, device, dtype, seed: int) -> tuple:
    """x `[1, N, H, D]`, as a projection gives it; then the weight, or scale and shift; then the table."""
    g = torch.Generator(device).manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=g, device=device).to(dtype)

    if case.kind == "modulation":
        return random(1, tokens, case.values), random(1, 1, case.values), random(1, 1, case.values)
    x = random(1, tokens, case.heads, case.width)
    weight = random(case.values if case.over == "token" else case.width)
    if case.kind == "norm":
        return (x.flatten(2) if case.over == "token" else x), weight
    angle = 2 * math.pi * torch.rand(1, tokens, 1, case.width // 2, generator=g, device=device)
    table = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    return x, weight, table


def rms(x, weight, over):
    """Over the last dimension, or over heads and dimensions together."""
    y = x.flatten(-2) if over == "token" and x.dim() == 4 else x
    return F.rms_norm(y, y.shape[-1:], weight, EPS).view(x.shape)


def turn(x, table, pairs):
    half = x.shape[-1] // 2
    y = x.to(table.dtype)
    a, b = (y[..., 0::2], y[..., 1::2]) if pairs == "interleaved" else (y[..., :half], y[..., half:])
    turned = [table[..., i, 0] * a + table[..., i, 1] * b for i in range(2)]
    return torch.stack(turned, -1 if pairs == "interleaved" else -2).flatten(-2).to(x.dtype)


def by_torch(case: Case) -> Callable:
    """Plain torch, as the models write it; in fp64 it is the truth."""
    if case.kind == "modulation":
        return lambda x, scale, shift: torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], None, None, EPS), 1 + scale)
    if case.kind == "norm":
        return lambda x, weight: rms(x, weight, case.over)
    return lambda x, weight, table: turn(rms(x, weight, case.over), table, case.pairs)


def by_us(case: Case, backend: str) -> Callable:
    from svg2_pack.svg2_core.ops.norm_rope import layer_norm, rms_norm, rms_norm_rotary

    if case.kind == "modulation":
        return lambda x, scale, shift: layer_norm(x, eps=EPS, factor=1 + scale, shift=shift, backend=backend)
    if case.kind == "norm":
        return lambda x, weight: rms_norm(x, weight, eps=EPS, backend=backend)

    def rotary(x, weight, table):
        out = torch.empty_like(x)
        rms_norm_rotary(x.transpose(1, 2), weight, table.transpose(1, 2), eps=EPS, over=case.over, pairs=case.pairs,
                        out=out.transpose(1, 2), backend=backend)  # fmt: skip
        return out

    return rotary


def by_kitchen(case: Case, backend: str) -> Callable | None:
    """comfy_kitchen's kernels of that backend, as ComfyUI could call them; None where it has none for this."""
    import comfy_kitchen as ck

    if case.kind == "modulation":

        def function(x, scale, shift):
            return ck.adaln(x, scale, shift, EPS)

        needs = "adaln"
    elif case.kind == "rotary":
        halves, fused = case.pairs == "halves", case.over == "head"
        needs = ("rms_rope" if fused else "apply_rope") + ("_split_half1" if halves else "1")
        call = getattr(ck, needs)

        def function(x, weight, table):
            return call(x, table, weight, EPS) if fused else call(rms(x, weight, case.over), table)
    else:
        return None
    if needs not in ck.list_backends()[backend]["capabilities"]:
        return None

    def run(*arguments):
        with ck.use_backend(backend):
            return function(*arguments)

    return run


def methods(case: Case, device) -> dict[str, Callable]:
    found = {"torch": by_torch(case)}
    try:
        import comfy_kitchen as ck

        for backend, state in ck.list_backends().items():
            if state["available"] and not state["disabled"]:
                found[f"comfy_kitchen {backend}"] = by_kitchen(case, backend)
    except ImportError as error:
        print(f"comfy_kitchen is not installed: {error}")
    backend = "triton" if device.type == "cuda" else "torch"
    found[f"svg2 {backend}"] = by_us(case, backend)
    return {name: method for name, method in found.items() if method is not None}


def check(name: str, result: torch.Tensor, torchs: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2 error against fp64. Raises WrongResult where it is more than twice torch's own, and a rounding."""

    def error(x):
        return ((x.double() - truth).norm() / truth.norm()).item()

    if result.shape != truth.shape:
        raise WrongResult(f"{name}: shape {list(result.shape)}")
    found, limit = error(result), 2 * error(torchs) + torch.finfo(result.dtype).eps / 2
    if not found <= limit:  # NaN fails too
        raise WrongResult(f"{name}: relative error {found:.1e}, at most {limit:.1e} is right")
    return found


def copy_bandwidth(device, size: int) -> float:
    """Bytes/s, read plus written, of a large copy in this process."""
    from timing import measure

    x = torch.empty(size, dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)
    return 2 * size / (measure(lambda x, y: y.copy_(x), [(x, y)]).p50 / 1000)


def one_case(case: Case, tokens: int, device, copy: float, seconds: float, where: dict) -> list[dict]:
    from timing import measure

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sets = [inputs(case, tokens, device, dtype, seed) for seed in range(3)]
    few = inputs(case, min(tokens, 2048), device, dtype, 9)  # fp64 of all of them would not fit
    truth, torchs = by_torch(case)(*(x.double() for x in few)), by_torch(case)(*few)
    rows = []
    for name, method in methods(case, device).items():
        try:
            error = check(name, method(*few), torchs, truth)
            check(
                f"{name}, all tokens",
                method(*sets[0])[:, -64:],
                by_torch(case)(*sets[0])[:, -64:],
                last_rows(case, sets[0]),
            )
            timing = measure(method, sets, seconds)
        except (RuntimeError, ValueError, TypeError, WrongResult) as failure:
            print(f"  {case.name:20} {tokens:8,} {name:22} not timed: {str(failure).splitlines()[0][:120]}")
            continue
        bandwidth = case.bytes(tokens, dtype.itemsize) / (timing.p50 / 1000)
        rows.append({**where, "case": case.name, "tokens": tokens, "method": name, "p20_ms": timing.p20, "p50_ms": timing.p50,
                     "p80_ms": timing.p80, "extra_mib": timing.extra_mib, "bandwidth": bandwidth, "of_copy": bandwidth / copy,
                     "error": error})  # fmt: skip
        print(
            f"  {case.name:20} {tokens:8,} {name:22} {timing.p50:9.4f} ms  {bandwidth / copy:5.0%} of a copy",
            flush=True,
        )
    return rows


def last_rows(case: Case, tensors: tuple) -> torch.Tensor:
    """fp64 of the last 64 tokens: where a grid that is too small, or a wrapped address, shows."""
    x, *rest = tensors
    rest = [r[:, -64:] if case.kind == "rotary" and r.dim() == 6 else r for r in rest]
    return by_torch(case)(*(t.double() for t in (x[:, -64:], *rest)))


def verdict(rows: list[dict]) -> str:
    """The target, who is fastest at each model's own length, and milliseconds per block."""
    lines = ["", f"at each model's 720p length (target: {TARGET:.0%} of a copy):"]
    for case in CASES:
        at = {row["method"]: row for row in rows if row["case"] == case.name and row["tokens"] == case.main}
        ours = next((row for name, row in at.items() if name.startswith("svg2")), None)
        if ours is None:
            continue
        others = {name: row["p50_ms"] for name, row in at.items() if not name.startswith("svg2")}
        best = min(others, key=others.get)
        lines.append(
            f"  {case.name:20} {ours['of_copy']:5.0%} {'met' if ours['of_copy'] >= TARGET else 'MISSED':7} "
            f"{others[best] / ours['p50_ms']:5.2f}x {best:22} per block {case.per_block} x {ours['p50_ms']:.3f} ms "
            f"instead of {case.per_block} x {others[best]:.3f} ms"
        )
    return "\n".join(lines)


def table(gpu: str) -> str:
    """Floors and expectations, from bytes alone: these operations compute next to nothing."""
    bandwidth = floors.GPUS[gpu].memory
    lines = [f"on one {gpu}, a copy at {bandwidth / 1e12:.2f} TB/s; bf16; milliseconds: floor / expected / plain torch's floor",
             f"{'case':20} {'tokens':>8} {'MB':>8} {'MFLOP':>8}"]  # fmt: skip
    for case in CASES:
        bytes_ = case.bytes(case.main)
        floor, torchs = (1000 * b / bandwidth for b in (bytes_, case.bytes_of_torch(case.main)))
        flops = case.main * case.values * {"norm": 4, "modulation": 7, "rotary": 10}[case.kind]
        lines.append(
            f"{case.name:20} {case.main:8,} {bytes_ / 1e6:8.0f} {flops / 1e6:8.0f} {floor:9.3f} / {floor / EXPECTED:.3f} / {torchs:.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one length per case")
    parser.add_argument("--model", action="store_true", help="print floors and expected times, and stop")
    parser.add_argument("--gpu", default="H200", choices=floors.GPUS, help="for --model")
    parser.add_argument("--csv", type=Path, metavar="FILE", default=RESULTS / "fused.csv", help="append the rows there")
    parser.add_argument(
        "--tiny", action="store_true", help="100 tokens, which a CPU can do: tries the program, measures nothing"
    )
    arguments = parser.parse_args()
    if arguments.model:
        print(table(arguments.gpu))
        return
    if not torch.cuda.is_available() and not arguments.tiny:
        sys.exit("This needs an NVIDIA GPU that torch can use. Without one: --model for floors and expected times.")
    load_pack()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where, copy = machine(device), copy_bandwidth(device, 2**24 if arguments.tiny else 2**30)
    print(f"{where['gpu']}: a copy moves {copy / 1e12:.3g} TB/s")
    rows = []
    for case in CASES:
        lengths = (100,) if arguments.tiny else (case.main,) if arguments.quick else sorted({*TOKENS, case.main})
        for tokens in lengths:
            rows += one_case(case, tokens, device, copy, 0.02 if arguments.tiny else 0.3, where)
    common.append_rows(arguments.csv, rows, FIELDS)
    if not arguments.tiny:
        print(verdict(rows))


if __name__ == "__main__":
    main()
