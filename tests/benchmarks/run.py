"""Time a sparse attention call against the fastest dense attention of this GPU, with the error beside it.

    python tests/benchmarks/run.py              all shapes; about half an hour on an H200
    python tests/benchmarks/run.py --quick      Wan 14B 720p at two presets, and the targets
    python tests/benchmarks/run.py --model      no GPU needed: floors and expected times (--gpu names one)
    python tests/benchmarks/run.py --device cpu [--quick]      this machine's CPU: see on_cpu.py

Needs torch and triton, an NVIDIA GPU (or --device cpu), and no ComfyUI. Rows are appended to results/speed.csv (or --csv FILE) and, with
--json FILE, written there; plot.py draws them and renews the table in web/docs/measurements.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import common

common.need_torch()

import floors  # noqa: E402
import torch  # noqa: E402
from common import RESULTS, ROOT, load_pack  # noqa: E402
from shapes import GROWTH, MAIN, SHAPES, TINY, Shape  # noqa: E402

PRESETS = {"turbo": 0.02, "balanced": 0.05, "quality": 0.1}  # and their densities, as the tests know
Q_CLUSTERS = (100, 200, 300, 400)
EXACT_ERROR = 1e-2  # bf16 attention of these inputs stays well below
QUANTISED_ERROR = 0.2
FIELDS = ("gpu", "driver", "torch", "triton", "commit", "date", "shape", "tokens", "heads", "text", "q_clusters", "k_clusters",
          "stage", "method", "compensation", "density", "p20_ms", "p50_ms", "p80_ms", "extra_mib", "rel_l2")  # fmt: skip


def shell(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine(device: torch.device) -> dict:
    """What a row has to say of where it comes from."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    gpu = device.type == "cuda"
    changed = "+" if shell("git", "status", "--porcelain", "svg2_core", "tests/benchmarks") else ""
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else "CPU",
        "driver": shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "",
        "torch": torch.__version__,
        "triton": version,
        "commit": shell("git", "rev-parse", "--short", "HEAD") + changed,
        "date": time.strftime("%Y-%m-%d"),
    }


class Bench:
    """All measurements of one shape; `rows` are what was found."""

    def __init__(self, shape: Shape, device: torch.device, where: dict, seconds: float):
        from activations import activations
        from svg2_pack.svg2_core import Layout
        from verify import sample_rows

        self.shape, self.where, self.seconds = shape, where, seconds
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.layout = Layout(shape.text, shape.video)
        # As Wan hands them over: a token's heads lie together.
        make = dict(grid=shape.grid, heads=shape.heads, text=shape.text, dtype=self.dtype, device=device, token_major=True)
        self.inputs = [activations(**make, seed=seed) for seed in range(3)]
        self.sampled = sample_rows(shape, device)
        self.truth = self._dense_truth(*self.inputs[0])
        self.rows: list[dict] = []

    def _dense_truth(self, q, k, v):
        from verify import dense_rows

        return dense_rows(q, k, v, self.sampled)

    def add(self, stage: str, method: str, timing, **more) -> dict:
        shape = asdict(self.shape)
        row = {**self.where, "shape": shape["name"], "tokens": self.shape.tokens, "stage": stage, "method": method,
               **{name: shape[name] for name in ("heads", "text", "q_clusters", "k_clusters")},
               "p20_ms": timing.p20, "p50_ms": timing.p50, "p80_ms": timing.p80, "extra_mib": timing.extra_mib, **more}  # fmt: skip
        self.rows.append(row)
        told = "  ".join(f"{k} {v:.3g}" for k, v in more.items() if isinstance(v, float))
        print(f"  {stage:14} {method:22} {timing.p50:9.3f} ms  {told}", flush=True)
        return row

    def time(self, call, inputs):
        from timing import measure

        return measure(call, inputs, self.seconds)

    # Dense

    def dense(self) -> None:
        from baselines import BASELINES, available
        from verify import WrongResult, check_attention

        found, missing = available()
        for name, why in missing.items():
            print(f"  dense          {name:22} not installed: {why}")
        exact = {baseline.name: baseline.exact for baseline in BASELINES}
        for name, attention in found.items():
            tolerance = EXACT_ERROR if exact[name] else QUANTISED_ERROR
            try:
                error = check_attention(name, attention(*self.inputs[0]), self.truth, self.sampled, tolerance)
            except (RuntimeError, ValueError, TypeError, WrongResult) as error:
                self.not_timed("dense", name, error)
                continue
            self.add("dense", name, self.time(attention, self.inputs), rel_l2=error, density=1.0)

    @property
    def fastest_dense(self) -> float:
        """Milliseconds of the fastest dense attention in the inputs' precision."""
        from baselines import BASELINES

        exact = {baseline.name for baseline in BASELINES if baseline.exact}
        return min(row["p50_ms"] for row in self.rows if row["stage"] == "dense" and row["method"] in exact)

    # Sparse

    def config(self, preset: str):
        """A preset's settings with the shape's clusters."""
        from dataclasses import replace

        from svg2_pack.svg2_core.presets import preset_config

        return replace(preset_config(preset, "wan_t2v"), q_clusters=self.shape.q_clusters, k_clusters=self.shape.k_clusters)

    def start(self, backend: str) -> None:
        """What the step before left, of each of the inputs: a cold call of nearly the same activations."""
        from svg2_pack.svg2_core import svg2_attention

        config = self.config("balanced")
        self.pasts = [svg2_attention(*map(self.past, qkv), self.layout, config, backend=backend).centroids for qkv in self.inputs]

    def past(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device, dtype=x.dtype)
        return x + 0.1 * x.std() * noise

    def parts(self, config, backend: str) -> list[list]:
        """Each of the inputs in the parts by heads that a call takes at a time."""
        from stages import Part
        from svg2_pack.svg2_core.attention import default_heads

        step = default_heads(self.inputs[0][0], self.layout, config, backend)
        heads = [slice(first, min(first + step, self.shape.heads)) for first in range(0, self.shape.heads, step)]
        return [[Part(qkv, some, past[0], self.shape, self.layout, config, backend) for some in heads]
                for qkv, past in zip(self.inputs, self.pasts, strict=True)]  # fmt: skip

    def stages(self, preset: str, backend: str, wanted: tuple[str, ...]) -> None:
        """The stages of a warm call, one after the other; of those wanted, times."""
        from stages import BY_DENSITY, STAGES

        calls = self.parts(self.config(preset), backend)
        inputs = [(parts[0].q, parts) for parts in calls]
        for stage in STAGES:

            def run(_, parts, stage=stage):
                for part in parts:
                    part.run(stage)

            for arguments in inputs:
                run(*arguments)
            errors = [part.check(stage, self.sampled) for part in calls[0]]
            if stage in wanted:
                more = {} if errors[0] is None else {"rel_l2": max(errors)}
                if stage in BY_DENSITY:
                    more["density"] = sum(part.density for part in calls[0]) / len(calls[0])
                self.add(stage, backend, self.time(run, inputs), **more)
            if stage == "kmeans_in" and stage in wanted:
                self.other_kmeans(calls, backend)
            if stage == "near_field" and stage in wanted:
                self.flashinfer(calls)

    def other_kmeans(self, calls, backend: str) -> None:
        """From a cold start, and flash-kmeans: Euclidean, in all channels, from the clusters that ours came to."""
        from baselines import flash_kmeans

        config = calls[0][0].config

        def cold(_, parts):
            return [part.clusters((None, None), config.kmeans_init_iters) for part in parts]

        for part, found in zip(calls[0], cold(None, calls[0]), strict=True):
            part.check_clusters(f"k-means from a cold start, {backend}", found)
        self.add("kmeans_in cold", backend, self.time(cold, [(parts[0].q, parts) for parts in calls]))
        theirs = flash_kmeans()
        if theirs is not None:
            inputs = [(part.video[role][0], part.groups[role].centroids[0].to(self.dtype)) for part in calls[0] for role in (0, 1)]
            self.add("kmeans_in", "flash-kmeans", self.time(
                lambda _: [theirs(x, start, config.kmeans_iters) for x, start in inputs], [(inputs[0][0],)]))  # fmt: skip

    def flashinfer(self, calls) -> None:
        """Its kernel on the same clusters and map, once for each density."""
        from sparse_baselines import flashinfer_attention
        from verify import WrongResult, check_attention

        density = calls[0][0].density
        done = any(row["method"] == "flashinfer" and abs(row["density"] - density) < 0.05 * density for row in self.rows)
        if done or self.shape.text:
            return
        try:
            attention = flashinfer_attention(calls[0][0].q.device)

            def run(_, parts):
                return [attention(part.q, part.k, part.v, *part.groups, part.selected) for part in parts]

            inputs = [(parts[0].q, parts) for parts in calls]
            errors = [check_attention("flashinfer", out, part.truth(self.sampled)[0], self.sampled, EXACT_ERROR)
                      for out, part in zip(run(*inputs[0]), calls[0], strict=True)]  # fmt: skip
        except (ImportError, AttributeError, OSError, RuntimeError, ValueError, TypeError, AssertionError, WrongResult) as error:
            self.not_timed("near_field", "flashinfer", error)
            return
        self.add("near_field", "flashinfer", self.time(run, inputs), density=density, rel_l2=max(errors))

    def sol(self, target: float) -> None:
        """ComfyUI's own sparse attention at this error, once for each."""
        from sparse_baselines import sol_attention, tau_for
        from verify import WrongResult, check_attention

        if any(row["method"] == "sol_attn" and row["rel_l2"] <= target <= 1.1 * row["rel_l2"] for row in self.rows):
            return
        try:
            attention = sol_attention(self.shape.text)

            def error_at(tau):
                return check_attention("sol_attn", attention(*self.inputs[0], tau), self.truth, self.sampled, torch.inf)

            tau = tau_for(error_at, target)
            error = error_at(tau)
        except (ImportError, AttributeError, OSError, RuntimeError, ValueError, TypeError, WrongResult) as error:
            self.not_timed("whole call", "sol_attn", error)
            return
        self.add("whole call", "sol_attn", self.time(lambda q, k, v: attention(q, k, v, tau), self.inputs), rel_l2=error, compensation="pooled")

    @staticmethod
    def not_timed(stage: str, method: str, error: Exception) -> None:
        print(f"  {stage:14} {method:22} not timed: {str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__}")

    def whole(self, preset: str, backend: str) -> None:
        """The call as the node makes it, warm."""
        from svg2_pack.svg2_core import svg2_attention
        from verify import check_attention

        config = self.config(preset)

        def call(q, k, v, past):
            return svg2_attention(q, k, v, self.layout, config, past, backend=backend)

        inputs = [(*qkv, past) for qkv, past in zip(self.inputs, self.pasts, strict=True)]
        result = call(*inputs[0])
        error = check_attention(f"whole call, {backend}", result.out, self.truth, self.sampled, 1.0)
        self.add("whole call", backend, self.time(call, inputs), density=result.density.item(), rel_l2=error, compensation=config.compensation)
        self.sol(error)


def backends(device: torch.device) -> list[str]:
    """Those that run here: Triton's stages, and the same around each of the prebuilt near fields."""
    from svg2_pack.svg2_core.ops import registry
    from svg2_pack.svg2_core.reasons import Refusal

    if device.type == "cpu":
        return [os.environ.get("SVG2_BACKEND", "torch")]  # triton, interpreted, takes ten minutes for --tiny
    found = []
    for name in ("triton", *registry.PREBUILT):
        answer = registry.choose(name, registry.Call(device, torch.bfloat16, 128))
        if not isinstance(answer, Refusal):
            found.append(name)
        else:
            print(f"{name}: {answer.reason.sentence} ({answer.detail})")
    return found


def first_use(device: torch.device) -> float:
    """Seconds until a backend has proved itself and answered its first call in this process."""
    from svg2_pack.svg2_core import Layout, SVG2Config, svg2_attention

    began = time.perf_counter()
    for backend in backends(device):
        x = torch.randn(1, 2, 4096, 128, device=device, dtype=torch.bfloat16)
        svg2_attention(x, x, x, Layout(0, 4096), SVG2Config(q_clusters=32, k_clusters=64, density=0.05), backend=backend)
        torch.cuda.synchronize()
    return time.perf_counter() - began


def query_cluster_sweep(device, where, seconds) -> list[dict]:
    """The near field alone, as query clusters get smaller."""
    from dataclasses import replace

    rows = []
    for count in Q_CLUSTERS:
        bench = Bench(replace(MAIN, name=f"q-clusters-{count}", q_clusters=count), device, where, seconds)
        bench.start("triton")
        for backend in backends(device):
            bench.stages("balanced", backend, ("near_field",))
        rows += bench.rows
    return rows


def one_shape(shape: Shape, presets, device, where, seconds) -> list[dict]:
    from stages import BY_DENSITY, STAGES

    print(f"{shape.name}: {shape.heads} heads, {shape.tokens:,} tokens", flush=True)
    bench = Bench(shape, device, where, seconds)
    bench.dense()
    first, *others = backends(device)
    bench.start(first)
    for i, preset in enumerate(presets):
        bench.stages(preset, first, STAGES if i == 0 else BY_DENSITY)
        bench.whole(preset, first)
        for backend in others:  # they differ in the near field
            bench.stages(preset, backend, ("near_field",))
            bench.whole(preset, backend)
    return bench.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, two presets")
    parser.add_argument("--model", action="store_true", help="print floors and expected times, and stop")
    parser.add_argument("--gpu", nargs="+", default=["H200"], choices=floors.GPUS, help="for --model")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", help="of --device cpu: these sizes alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows there (default: results/speed.csv, speed_cpu.csv)")
    parser.add_argument("--tiny", action="store_true", help="a shape that a CPU can do: tries the program, measures nothing")
    arguments = parser.parse_args()
    if arguments.model:
        print("\n\n".join(floors.table(shape, PRESETS.values(), gpu) for gpu in arguments.gpu for shape in SHAPES))
        return
    if arguments.device == "cpu":
        import on_cpu

        load_pack()
        rows = on_cpu.run(machine(torch.device("cpu")), arguments.quick, arguments.tokens, arguments.csv or RESULTS / "speed_cpu.csv")
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        return
    if not torch.cuda.is_available() and not arguments.tiny:
        sys.exit("This needs an NVIDIA GPU that torch can use. Without one: --device cpu, or --model for floors and expected times.")
    load_pack()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = machine(device)
    seconds = 0.3 if arguments.quick or arguments.tiny else 1.0
    rows = []
    if device.type == "cuda":
        from targets import report
        from timing import ceilings

        limits = {"first_use_s": first_use(device), **ceilings(device)}
        print({name: f"{value:.3g}" for name, value in limits.items()})
    shapes = (TINY,) if arguments.tiny else (MAIN,) if arguments.quick else (*SHAPES, *GROWTH)
    for shape in shapes:
        presets = ("quality",) if arguments.tiny else ("turbo", "balanced") if arguments.quick else ("balanced",) if shape in GROWTH else PRESETS
        rows += one_shape(shape, presets, device, where, seconds)
    if not (arguments.quick or arguments.tiny):
        rows += query_cluster_sweep(device, where, seconds)
    common.append_rows(arguments.csv or RESULTS / "speed.csv", rows, FIELDS)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if device.type == "cuda":
        print(report(rows, limits))


if __name__ == "__main__":
    main()
