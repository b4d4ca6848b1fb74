"""Time a sparse attention call against the fastest dense attention of this GPU, with the error beside it.

    python tests/benchmarks/run.py              all shapes; about half an hour on an H200
    python tests/benchmarks/run.py --quick      Wan 14B 720p at two densities, and the targets
    python tests/benchmarks/run.py --model      no GPU needed: floors and expected times (--gpu names one)
    python tests/benchmarks/run.py --device cpu [--quick]      this machine's CPU: see on_cpu.py

Needs torch and triton, an NVIDIA GPU (or --device cpu), and no ComfyUI. Rows are appended to results/speed.csv (or --csv FILE) and, with
--json FILE, written there; plot.py draws them and renews the README's table.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import common

common.need_torch()

import floors  # noqa: E402
import torch  # noqa: E402
from shapes import GROWTH, MAIN, SHAPES, TINY, Shape  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
DENSITIES = (0.05, 0.1, 0.2, 0.3)
Q_CLUSTERS = (100, 200, 300, 400)
WARM, COLD = 2, 10  # k-means iterations
EXACT_ERROR = 1e-2  # bf16 attention of these inputs stays well below
QUANTISED_ERROR = 0.2
FIELDS = ("gpu", "driver", "torch", "triton", "commit", "date", "shape", "tokens", "heads", "text", "q_clusters", "k_clusters",
          "stage", "method", "compensation", "density", "p20_ms", "p50_ms", "p80_ms", "extra_mib", "rel_l2")  # fmt: skip


def load_pack() -> None:
    """The pack as `svg2_pack`; its core needs no ComfyUI."""
    spec = importlib.util.spec_from_file_location("svg2_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["svg2_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["svg2_pack"])


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
        from svg2_pack.svg2_core import Layout, SVG2Config
        from verify import sample_rows

        self.shape, self.where, self.seconds = shape, where, seconds
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.config = SVG2Config(q_clusters=shape.q_clusters, k_clusters=shape.k_clusters, min_k_ratio=0.0,
                                 kmeans_init_iters=COLD, kmeans_iters=WARM)  # fmt: skip
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

    def heads(self, backend: str) -> list[slice]:
        """The heads that a call takes at a time, as the whole call does."""
        from svg2_pack.svg2_core.attention import default_heads

        step = default_heads(self.inputs[0][0], self.layout, self.config, backend)
        return [slice(first, min(first + step, self.shape.heads)) for first in range(0, self.shape.heads, step)]

    def past(self, x: torch.Tensor) -> torch.Tensor:
        """The step before, of this video: nearly the same activations."""
        noise = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device, dtype=x.dtype)
        return x + 0.1 * x.std() * noise

    def cluster(self, x, count, role, backend, iterations, init=None):
        from svg2_pack.svg2_core.ops.kmeans import Clusters, kmeans

        parts = [kmeans(x[:, heads, self.layout.video], count, iterations=iterations, init=None if init is None else init[:, heads],
                        seed=0, role=role, first_head=heads.start, backend=backend) for heads in self.heads(backend)]  # fmt: skip
        return Clusters(*(torch.cat(field, 1) for field in zip(*parts, strict=True)))

    def clusters(self, backend: str) -> None:
        """k-means of q and k: warm from the step before, cold, and flash-kmeans from the same start."""
        from baselines import flash_kmeans
        from verify import check_clusters

        counts = (self.shape.q_clusters, self.shape.k_clusters)
        starts = [[self.cluster(self.past(x), c, role, backend, COLD).centroids for role, (x, c) in enumerate(zip(qkv, counts, strict=False))]
                  for qkv in self.inputs]  # fmt: skip

        def run(q, k, start_q, start_k, iterations):
            return [self.cluster(x, c, role, backend, iterations, start)
                    for role, (x, c, start) in enumerate(zip((q, k), counts, (start_q, start_k), strict=True))]  # fmt: skip

        warm = [(q, k, *start) for (q, k, _), start in zip(self.inputs, starts, strict=True)]
        self.groups = [run(*arguments, WARM) for arguments in warm]
        for name, x, groups in zip("qk", self.inputs[0], self.groups[0], strict=False):
            check_clusters(f"k-means of {name}, {backend}", x[:, :, self.layout.video], groups, tolerance=0.05)
        self.add("k-means warm", backend, self.time(lambda *a: run(*a, WARM), warm))
        self.add("k-means cold", backend, self.time(lambda q, k, *_: run(q, k, None, None, COLD), warm))
        theirs = flash_kmeans()
        if theirs is not None:
            def flash(q, k, start_q, start_k):
                for x, start in ((q, start_q), (k, start_k)):
                    theirs(x[0, :, self.layout.video], start[0].to(x.dtype), WARM)

            self.add("k-means warm", "flash-kmeans", self.time(flash, warm))
        self.starts = starts

    def map(self, groups, top_p: float, backend: str):
        from svg2_pack.svg2_core.ops.select import select_by_mass

        q, k = groups
        return select_by_mass(q, k, top_p=top_p, min_k_ratio=0.0, scale=128**-0.5, backend=backend)

    def density_of(self, selected) -> float:
        """Pairs computed exactly over all pairs, of a map of the first inputs; those with a text token are all exact."""
        from svg2_pack.svg2_core.attention import exact_pairs

        text = self.shape.tokens**2 - self.layout.video_len**2
        return (exact_pairs(*self.groups[0], selected).mean().item() + text) / self.shape.tokens**2

    def top_p_for(self, density: float, backend: str) -> float:
        """The top_p that gives this density on the first inputs, within 2%."""
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            got = self.density_of(self.map(self.groups[0], middle, backend))
            if abs(got - density) < 0.02 * density:
                break
            low, high = (middle, high) if got < density else (low, middle)
        return middle

    def stages(self, density: float, backend: str) -> None:
        """Map, means of the values and attention, each alone, on clusters that are given."""
        from svg2_pack.svg2_core.ops.dynamic_attention import Tail, dynamic_attention
        from svg2_pack.svg2_core.ops.kmeans import Clusters, cluster_means
        from verify import check_attention, check_map, sparse_rows

        def some(groups, heads):
            return Clusters(*(field[:, heads].contiguous() for field in groups))

        top_p = self.top_p_for(density, backend)
        maps = [self.map(groups, top_p, backend) for groups in self.groups]
        check_map(f"block map, {backend}", *self.groups[0], maps[0], top_p)
        got = self.density_of(maps[0])
        self.add("block map", backend, self.time(lambda *fields: self.map(self.rebuilt(fields), top_p, backend),
                                                         [(*q, *k) for q, k in self.groups]), density=got)

        def values(v, k_groups):
            return [cluster_means(v[:, heads, self.layout.video], some(k_groups, heads), backend=backend) for heads in self.heads(backend)]

        means = [(v, groups[1]) for (_, _, v), groups in zip(self.inputs, self.groups, strict=True)]
        self.add("compensation", backend, self.time(values, means), density=got)

        def attend(q, k, v, q_groups, k_groups, selected, tails):
            out = torch.empty_like(q)
            for i, heads in enumerate(self.heads(backend)):
                dynamic_attention(q[:, heads], k[:, heads], v[:, heads], some(q_groups, heads), some(k_groups, heads), selected[:, heads].contiguous(),
                                  layout=self.layout, scale=128**-0.5, tail=None if tails is None else tails[i], out=out[:, heads], backend=backend)  # fmt: skip
            return out

        for compensation in (False, True):
            calls = []
            for qkv, groups, selected in zip(self.inputs, self.groups, maps, strict=True):
                tails = None
                if compensation:
                    parts = zip(self.heads(backend), values(qkv[2], groups[1]), strict=True)
                    tails = [Tail(groups[1].centroids[:, h], value, groups[1].sizes[:, h].float().log()) for h, value in parts]
                calls.append((*qkv, *groups, selected, tails))
            truth = sparse_rows(*self.inputs[0], self.shape, self.sampled, *self.groups[0], maps[0], compensation)
            out = attend(*calls[0])
            check_attention(f"attention, {backend}", out, truth, self.sampled, EXACT_ERROR)
            error = check_attention(f"attention, {backend}", out, self.truth, self.sampled, torch.inf)
            self.add("attention", backend, self.time(attend, calls), density=got, rel_l2=error,
                     compensation="centroid" if compensation else "off")  # fmt: skip
            if not compensation:
                self.flashinfer([call[:-1] for call in calls], truth, got)

    def flashinfer(self, calls, truth, density: float) -> None:
        """Its kernel on the same clusters and map, once for each density."""
        from sparse_baselines import flashinfer_attention
        from verify import WrongResult, check_attention

        done = any(row["method"] == "flashinfer" and abs(row["density"] - density) < 0.05 * density for row in self.rows)
        if done or self.shape.text:
            return
        try:
            attention = flashinfer_attention(calls[0][0].device)
            out = attention(*calls[0])
            check_attention("flashinfer", out, truth, self.sampled, EXACT_ERROR)
            error = check_attention("flashinfer", out, self.truth, self.sampled, torch.inf)
        except (ImportError, AttributeError, OSError, RuntimeError, ValueError, TypeError, AssertionError, WrongResult) as error:
            self.not_timed("attention", "flashinfer", error)
            return
        self.add("attention", "flashinfer", self.time(attention, calls), density=density, rel_l2=error, compensation="off")

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

    @staticmethod
    def rebuilt(fields):
        """Query and key clusters from their six tensors."""
        from svg2_pack.svg2_core.ops.kmeans import Clusters

        return Clusters(*fields[:3]), Clusters(*fields[3:])

    def whole(self, density: float, backend: str) -> None:
        """The call as the node makes it, warm."""
        from dataclasses import replace

        from svg2_pack.svg2_core import svg2_attention
        from svg2_pack.svg2_core.cache import Centroids
        from verify import check_attention

        for compensation in ("off", "centroid"):
            config = replace(self.config, top_p=max(self.top_p_for(density, backend), 1e-6), compensation=compensation)

            def call(q, k, v, warm, config=config):
                return svg2_attention(q, k, v, self.layout, config, warm, backend=backend)

            pasts = [[Centroids.pack(q[0], k[0])] for q, k in self.starts]
            inputs = [(*qkv, past) for qkv, past in zip(self.inputs, pasts, strict=True)]
            result = call(*inputs[0])
            error = check_attention(f"whole call, {backend}", result.out, self.truth, self.sampled, 1.0)
            self.add("whole call", backend, self.time(call, inputs), density=result.density.item(), rel_l2=error, compensation=compensation)
            if compensation == "centroid":
                self.sol(error)


def backends(device: torch.device) -> list[str]:
    from svg2_pack.svg2_core.ops import registry
    from svg2_pack.svg2_core.reasons import Refusal

    if device.type == "cpu":
        return ["torch"]
    found = []
    for name in registry.NAMES:
        answer = registry.choose(name, registry.Call(device, torch.bfloat16, 128))
        if isinstance(answer, Refusal):
            print(f"{name}: {answer.reason.sentence} ({answer.detail})")
        elif name != "torch":
            found.append(name)
    return found


def first_use(device: torch.device) -> float:
    """Seconds until a backend has proved itself and answered its first call in this process."""
    from svg2_pack.svg2_core import Layout, SVG2Config, svg2_attention

    began = time.perf_counter()
    for backend in backends(device):
        x = torch.randn(1, 2, 4096, 128, device=device, dtype=torch.bfloat16)
        svg2_attention(x, x, x, Layout(0, 4096), SVG2Config(q_clusters=32, k_clusters=64, top_p=0.5), backend=backend)
        torch.cuda.synchronize()
    return time.perf_counter() - began


def query_cluster_sweep(device, where, seconds) -> list[dict]:
    """The attention alone, as query clusters get smaller."""
    from dataclasses import replace

    rows = []
    for count in Q_CLUSTERS:
        bench = Bench(replace(MAIN, name=f"q-clusters-{count}", q_clusters=count), device, where, seconds)
        for backend in backends(device):
            bench.clusters(backend)
            bench.stages(0.1, backend)
        rows += bench.rows
    return rows


def one_shape(shape: Shape, densities, device, where, seconds) -> list[dict]:
    print(f"{shape.name}: {shape.heads} heads, {shape.tokens:,} tokens", flush=True)
    bench = Bench(shape, device, where, seconds)
    bench.dense()
    for backend in backends(device):
        bench.clusters(backend)
        for density in densities:
            bench.stages(density, backend)
            bench.whole(density, backend)
    return bench.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, two densities")
    parser.add_argument("--model", action="store_true", help="print floors and expected times, and stop")
    parser.add_argument("--gpu", default="H200", choices=floors.GPUS, help="for --model")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", help="of --device cpu: these sizes alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows there (default: results/speed.csv, speed_cpu.csv)")
    parser.add_argument("--tiny", action="store_true", help="a shape that a CPU can do: tries the program, measures nothing")
    arguments = parser.parse_args()
    if arguments.model:
        for shape in SHAPES:
            print(floors.table(shape, DENSITIES, arguments.gpu), end="\n\n")
        if arguments.gpu in floors.HOPPER:
            print(floors.hopper_table(MAIN, DENSITIES, Q_CLUSTERS, arguments.gpu))
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
        densities = (0.3,) if arguments.tiny else (0.1, 0.2) if arguments.quick else (0.1,) if shape in GROWTH else DENSITIES
        rows += one_shape(shape, densities, device, where, seconds)
    if not (arguments.quick or arguments.tiny):
        rows += query_cluster_sweep(device, where, seconds)
    common.append_rows(arguments.csv or RESULTS / "speed.csv", rows, FIELDS)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if device.type == "cuda":
        print(report(rows, limits))


if __name__ == "__main__":
    main()
