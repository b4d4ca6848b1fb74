"""What a sparse call has to do at least, and how long it is expected to take: operations and bytes of each of its kernels.

Counts follow from the kernels as written (svg2_core/ops, the triton.py of each stage), padding included. **All that is assumed
stands in this file's capitals; none of it but the H200's ceilings has been measured on a GPU.** A kernel's floor is the slowest of
what it needs: tensor cores, fp32 lanes, exponentials, device memory, L2. Expected: the same at the shares of those speeds that a
kernel of its kind reaches; or the time it waits, if that is longer: steps one after another, each of which waits for memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from shapes import HEAD_DIM, Shape


@dataclass(frozen=True)
class GPU:
    """tensor: bf16 FLOP/s of a large product, fp32 sums; memory: bytes/s of a copy; l2: bytes/s out of L2, of l2_bytes;
    multiprocessors at clock Hz, each with so many fp32 lanes and 16 exponentials a clock. dense: share of tensor that the fastest dense
    attention reaches; near: the same of each near field."""

    tensor: float
    memory: float
    l2: float
    l2_bytes: float
    multiprocessors: int
    clock: float
    dense: float
    near: dict[str, float]
    lanes: int = 128


_HOPPER = {"triton": 0.5, "cuda": 0.5, "cuda_fa3": 0.83}  # mma.sync, which `cuda` has, is 0.6 of wgmma there
_OTHERS = {"triton": 0.6, "cuda": 0.68}
# H200: tensor and memory measured, and taken for the H100's chip, whose memory is slower. The others: the vendor's datasheets.
# l2: guesses, from what others measured by reading.
GPUS = {
    "H200": GPU(788e12, 4.3e12, 5.5e12, 50e6, 132, 1.7e9, 0.75, _HOPPER),
    "H100": GPU(788e12, 3.0e12, 5.5e12, 50e6, 132, 1.7e9, 0.75, _HOPPER),
    "A100": GPU(312e12, 2.04e12, 4.0e12, 40e6, 108, 1.41e9, 0.72, _OTHERS, lanes=64),
    "RTX 5090": GPU(209e12, 1.79e12, 6.0e12, 96e6, 170, 2.4e9, 0.9, _OTHERS),
    "RTX 4090": GPU(165e12, 1.01e12, 4.5e12, 72e6, 128, 2.5e9, 0.9, _OTHERS),
    "RTX 3090": GPU(71e12, 0.94e12, 2.2e12, 6e6, 82, 1.7e9, 0.9, _OTHERS),
}
SHARES = {"tensor": 0.5, "lanes": 0.6, "exps": 0.6, "memory": 0.85, "l2": 0.8}  # that are expected of a kernel
TOGETHER = 1.1  # the price of needing several of them at once
STEP = 1e-6  # seconds of a step that waits for what it loads, mostly an index and then the rows it names
WARPS = 16  # that a multiprocessor has room for: 128 registers a thread
LAUNCH = 2.5e-6  # seconds between two kernels, on the device
TORCHS = 8  # launches of torch's in a call: casts, zeros, sums
# Steps of one head's program of the subspace iteration, counted by hand: 6 orthonormalisations of 31 (32 columns of a factor are 13 of
# them), 9 products of 9, its matrices and what it stores 43, what the past takes 42.
DIRECTIONS, WITH_PAST = 310, 42

# Of svg2_core/ops.
HIGH, LOW = 128, 64  # rows of the two query tiles
GRANULE, KEYS = 16, 64  # keys of a granule, of a step (32 without wgmma: only the last one's padding)
RANK, VARIANCES = 32, 16  # directions of the metric and of the far field's variances
SAMPLE, SPLITS, WITHIN_SPLITS, SAMPLED, EXACT = 8192, 4, 16, 256, 32
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Kernel:
    """One launch, or several that do the same. tensor: FLOP; lanes: fp32 instructions; exps; memory, l2: bytes. programs, each with so
    many steps that wait and so many warps; no steps where copies run ahead."""

    name: str
    tensor: float = 0
    lanes: float = 0
    exps: float = 0
    memory: float = 0
    l2: float = 0
    programs: float = 1
    steps: float = 0
    warps: int = 4
    launches: int = 1

    def needs(self, gpu: GPU) -> dict[str, float]:
        """Seconds, by what is needed, at its full speed."""
        cycles = gpu.multiprocessors * gpu.clock
        return {"tensor": self.tensor / gpu.tensor, "lanes": self.lanes / (gpu.lanes * cycles), "exps": self.exps / (16 * cycles),
                "memory": self.memory / gpu.memory, "l2": (self.memory + self.l2) / gpu.l2}  # fmt: skip

    def floor(self, gpu: GPU) -> float:
        return max(self.needs(gpu).values()) + self.launches * LAUNCH

    def expected(self, gpu: GPU, near: str = "") -> tuple[float, str]:
        """Seconds, and what limits it. near: by which implementation, if this is the near field."""
        shares = {**SHARES, "tensor": gpu.near[near]} if near else SHARES
        times = {name: TOGETHER * seconds / shares[name] for name, seconds in self.needs(gpu).items()}
        times["waits"] = ceil(self.programs / (gpu.multiprocessors * (WARPS // self.warps))) * self.steps * STEP
        limit = max(times, key=times.get)
        return times[limit] + self.launches * LAUNCH, limit


def dense(shape: Shape) -> Kernel:
    rows = shape.tokens * HEAD_DIM * shape.heads
    return Kernel("dense", tensor=4 * shape.tokens * rows, exps=shape.tokens**2 * shape.heads, memory=4 * BF16 * rows)


def dense_seconds(shape: Shape, gpu: GPU) -> tuple[float, float]:
    """Floor, expected."""
    kernel = dense(shape)
    return kernel.floor(gpu), max(kernel.tensor / gpu.tensor / gpu.dense, kernel.floor(gpu))


def padded_rows(shape: Shape) -> float:
    """Query rows in tiles: a cluster's last rows fill a low tile or most of a high one, by 32 rows too many on average."""
    return shape.video + shape.q_clusters * LOW / 2


def query_tiles(shape: Shape) -> float:
    """Of one head: the last one of a cluster is high as often as low."""
    return shape.video / HIGH + shape.q_clusters / 2


def logit_spaces(shape: Shape) -> list[Kernel]:
    return 2 * [_sample(shape)] + 2 * [_directions(shape, past=True)]


def _sample(shape: Shape) -> Kernel:
    tokens = min(shape.video, SAMPLE)
    rows = tokens * HEAD_DIM * shape.heads
    return Kernel("sample", 2 * rows * HEAD_DIM, 8 * rows, memory=BF16 * rows, programs=SPLITS * shape.heads, steps=tokens / SPLITS / 32, warps=8)


def _directions(shape: Shape, past: bool) -> Kernel:
    return Kernel("directions", programs=shape.heads, steps=DIRECTIONS + past * WITH_PAST,
                  memory=2 * SPLITS * HEAD_DIM**2 * FP32 * shape.heads)  # fmt: skip


def kmeans_in(shape: Shape, iterations: int = 1) -> list[Kernel]:
    """Of queries and of keys. Each iteration reads the tokens once where they are assigned, and gathers them once for the means."""
    h, n, found = shape.heads, shape.video, []
    rows, chunks = n * HEAD_DIM * h, ceil(n / 256)
    for c in (shape.q_clusters, shape.k_clusters):
        counts = FP32 * chunks * c * h
        bins = 1 << c.bit_length()
        found.append(Kernel("start", programs=c * h, steps=2, warps=1))
        found += iterations * [
            # The distances' products are 32 deep: comparing them takes longer.
            Kernel("assign", 2 * n * RANK * (HEAD_DIM + c) * h, 8 * rows + 8 * n * c * h, memory=BF16 * rows + counts + FP32 * n * h,
                   l2=chunks * c * (RANK * BF16 + FP32) * h),
            Kernel("scan", memory=2 * counts, programs=h, steps=2 * chunks / max(1, 8192 // bins), warps=8),
            Kernel("scatter", lanes=3 * 256 * n * h, memory=2 * FP32 * n * h, l2=2 * 32 * n * h),
            Kernel("means", lanes=8 * rows, memory=(BF16 * HEAD_DIM + FP32) * n * h, programs=c * h, steps=n / c / 32 + 1),
        ]  # fmt: skip
    return found


def moments(shape: Shape) -> list[Kernel]:
    n, h, c_q, c_k = shape.video, shape.heads, shape.q_clusters, shape.k_clusters
    rows, pairs = n * HEAD_DIM * h, c_q * c_k * h
    padded = rows * (1 + 16 * c_k / n)  # in steps of 32 keys
    step, blocks = max(1, c_k // SAMPLED), ceil(c_q / 64)
    return [
        _sample(shape),
        _within(shape, step, matrices=1),
        _directions(shape, past=False),
        Kernel("query_variances", lanes=10 * rows, memory=BF16 * rows, programs=c_q * h, steps=n / c_q / 32 + 1),
        # Keys and values once, and the keys again out of L2 for every 64 query centroids, deviations made anew each time.
        Kernel("key_moments", 2 * padded * (VARIANCES + c_q), (16 + 8 * blocks) * padded + 8 * padded / HEAD_DIM * c_q, padded / HEAD_DIM * c_q,
               memory=2 * BF16 * rows + 2 * FP32 * pairs, l2=BF16 * rows * blocks + c_k * c_q * HEAD_DIM * BF16 * h + 2 * 32 * pairs,
               programs=c_k * h, steps=(1 + blocks) * (n / c_k / 32 + 0.5) + 2),
        Kernel("add_product", lanes=pairs * HEAD_DIM, memory=2 * FP32 * pairs),
    ]  # fmt: skip


def _within(shape: Shape, step: int, matrices: int) -> Kernel:
    """Of every step-th cluster; matrices that it gathers: the keys, or keys and values."""
    n, c = shape.video / step, shape.k_clusters / step
    rows = n * HEAD_DIM * shape.heads
    return Kernel("within", 2 * rows * HEAD_DIM, 8 * matrices * rows, memory=matrices * BF16 * rows, programs=WITHIN_SPLITS * shape.heads,
                  steps=c / WITHIN_SPLITS * (n / c / 32 + 0.5 + 1), warps=8)  # fmt: skip


def select_by_error(shape: Shape) -> list[Kernel]:
    h, c_q, c_k = shape.heads, shape.q_clusters, shape.k_clusters
    pairs, blocks = c_q * c_k * h, ceil(c_q / 16)
    counters = 4096 * 8 * c_q * h  # read by each program
    return [
        Kernel("worth", lanes=2 * pairs * HEAD_DIM, exps=2 * pairs, memory=4 * FP32 * pairs, l2=2 * blocks * c_k * HEAD_DIM * FP32 * h,
               programs=blocks * h, steps=4 * c_k / 64),
        Kernel("count_pairs", memory=3 * FP32 * pairs, l2=32 * pairs + 1.5 * counters, programs=c_q * h, steps=3 * 3, launches=3),
        Kernel("ties", memory=FP32 * pairs, l2=counters, programs=c_q * h, steps=4),
        Kernel("choose", memory=(2 * FP32 + 1) * pairs, l2=counters, programs=c_q * h, steps=5),
    ]  # fmt: skip


def near_keys(shape: Shape, density: float) -> float:
    """Keys that a query tile multiplies, the padding of granules and of the last step included."""
    keys = density * (shape.video + shape.k_clusters * (GRANULE - 1) / 2) + KEYS / 2
    return keys + (shape.text + KEYS / 2 if shape.text else 0)


def gathered_bytes(shape: Shape, density: float) -> float:
    """Keys and values that the near field's tiles read, out of L2 if it holds a head's."""
    return query_tiles(shape) * (density * shape.video + shape.text) * 2 * BF16 * HEAD_DIM * shape.heads


def near_field(shape: Shape, density: float, gpu: GPU) -> list[Kernel]:
    n, h, c_q, c_k = shape.video, shape.heads, shape.q_clusters, shape.k_clusters
    logits, rows = padded_rows(shape) * near_keys(shape, density) * h, shape.tokens * HEAD_DIM * h
    gathered = gathered_bytes(shape, density)
    once = min(gathered, 2 * BF16 * rows)
    missed = max(0.0, 1 - gpu.l2_bytes / (2 * BF16 * shape.tokens * HEAD_DIM)) * (gathered - once)  # of one head at a time
    listed = FP32 * density * (n / GRANULE + c_k / 2) * c_q * h
    found = [
        Kernel("pad", memory=2 * FP32 * n * h, l2=FP32 * c_k**2 * h, programs=c_k * h, steps=c_k / 512 + 3, warps=1),
        Kernel("list", memory=c_q * c_k * h + listed, programs=c_q * h, steps=12),
        Kernel("tiles", programs=ceil(c_q / 32) * h, steps=2 * c_q / 128 + 4),
        Kernel("near", 4 * logits * HEAD_DIM, 8 * logits, logits, memory=2 * BF16 * n * HEAD_DIM * h + once + missed, l2=gathered - once - missed, launches=2),
    ]  # fmt: skip
    if shape.text:
        found.append(Kernel("text queries", 4 * shape.text * rows, memory=2 * BF16 * rows))
    return found


def exact_rows(shape: Shape) -> list[Kernel]:
    rows = shape.tokens * HEAD_DIM * shape.heads
    logits = EXACT * shape.tokens * shape.heads
    return [
        Kernel("part", 4 * EXACT * rows, 8 * logits, logits, memory=2 * BF16 * rows, programs=16 * shape.heads, steps=shape.tokens / 16 / 64),
        Kernel("sum", programs=shape.heads, steps=16),
    ]


def far_field(shape: Shape) -> list[Kernel]:
    """Stand-ins cost the same at every density: selected ones are masked."""
    n, h, c_q, c_k = shape.video, shape.heads, shape.q_clusters, shape.k_clusters
    pairs, rows, padded = c_q * c_k * h, n * HEAD_DIM * h, padded_rows(shape) * h
    logits = padded * c_k
    stand_in = 2 * BF16 * HEAD_DIM + FP32 * (VARIANCES + 2) + 1  # centroid and mean value, variances, mass, size, selected
    return [
        Kernel("skipped", lanes=2 * pairs * HEAD_DIM, exps=2 * pairs, memory=2 * (FP32 + 1) * pairs, l2=2 * pairs / 16 * HEAD_DIM * FP32,
               programs=c_k / 64 * h, steps=2 * 2 * max(c_k / 64, c_q / 16), launches=2),
        _within(shape, 1, matrices=2),
        Kernel("matrix", memory=2 * WITHIN_SPLITS * HEAD_DIM**2 * FP32 * h, programs=h, steps=2 * HEAD_DIM / 16),
        Kernel("share", programs=h, steps=n / 256 + 2 * c_k / 16 + 10, memory=FP32 * n * h, lanes=3 * EXACT * n * h, warps=8),
        Kernel("tiles", programs=ceil(c_q / 32) * h, steps=2 * c_q / 128 + 4),
        Kernel("far", 2 * logits * (2 * HEAD_DIM + VARIANCES) + 2 * padded * HEAD_DIM * (HEAD_DIM + VARIANCES), 11 * logits, logits,
               memory=3 * BF16 * rows + FP32 * n * h, l2=query_tiles(shape) * h * (c_k * stand_in + BF16 * HEAD_DIM**2) + BF16 * rows, launches=2),
    ]  # fmt: skip


def report(shape: Shape) -> list[Kernel]:
    pairs = shape.q_clusters * shape.k_clusters * shape.heads
    steps = 2 * ceil(shape.q_clusters / 16) * ceil(shape.k_clusters / 512)
    return [
        Kernel("squared_error", programs=shape.heads, steps=3),
        Kernel("exact_pairs", memory=pairs, programs=shape.heads, steps=steps, warps=8),
        Kernel("summary", steps=3),
    ]


def stages(shape: Shape, density: float, gpu: GPU, iterations: int = 1) -> dict[str, list[Kernel]]:
    """The kernels of one warm call of first order, all heads in one go, in the order in which they run. iterations: of k-means."""
    every: dict[str, Callable[[], list[Kernel]]] = {
        "logit_spaces": lambda: logit_spaces(shape),
        "kmeans_in": lambda: kmeans_in(shape, iterations),
        "moments": lambda: moments(shape),
        "select_by_error": lambda: select_by_error(shape),
        "near_field": lambda: near_field(shape, density, gpu),
        "exact_rows": lambda: exact_rows(shape),
        "far_field": lambda: far_field(shape),
        "report": lambda: report(shape),
    }
    return {name: make() for name, make in every.items()}


def stage_seconds(name: str, kernels: list[Kernel], gpu: GPU, near: str = "triton") -> tuple[float, float, str]:
    """Floor, expected, and what limits the longest of its kernels."""
    expected = [k.expected(gpu, near if name == "near_field" and k.name == "near" else "") for k in kernels]
    longest, limit = max(expected)
    name = kernels[expected.index((longest, limit))].name
    return sum(k.floor(gpu) for k in kernels), sum(seconds for seconds, _ in expected), f"{name}: {limit}"


def like(name: str, tensor: float, memory: float) -> GPU:
    """The GPU of this name, with the ceilings that were measured of it; an unknown one's other numbers are an H200's."""
    known = next((gpu for key, gpu in GPUS.items() if key in name), GPUS["H200"])
    return replace(known, tensor=tensor, memory=memory)


def launches(kernels: dict[str, list[Kernel]]) -> int:
    """Triton's, of a call without text."""
    return sum(k.launches for stage in kernels.values() for k in stage if k.name != "text queries")


def whole(shape: Shape, density: float, gpu: GPU, near: str = "triton", iterations: int = 1) -> tuple[float, float]:
    """Seconds of the whole call: floor, expected."""
    parts = [stage_seconds(name, kernels, gpu, near) for name, kernels in stages(shape, density, gpu, iterations).items()]
    return tuple(sum(part[i] for part in parts) + TORCHS * LAUNCH for i in range(2))


def table(shape: Shape, densities, name: str, iterations: int = 1) -> str:
    """For people: floor and expected milliseconds of every stage, and the speed-up they make."""
    gpu = GPUS[name]

    def line(what: str, pairs, more: str = "") -> str:
        return f"{what:24}" + "".join(f"{1000 * floor:8.2f} /{1000 * expected:7.2f}" for floor, expected in pairs) + f"   {more}"

    dense_floor, dense_time = dense_seconds(shape, gpu)
    calls = [stages(shape, density, gpu, iterations) for density in densities]
    lines = [
        f"{shape.name} on one {name}: {shape.heads} heads, {shape.video:,} video + {shape.text} text tokens, "
        f"{shape.q_clusters}/{shape.k_clusters} clusters, k-means iterations: {iterations}; milliseconds, floor / expected",
        f"{'density':24}" + "".join(f"{density:17g}" for density in densities) + "   longest kernel: what limits it",
    ]
    for stage in calls[0]:
        for near in gpu.near if stage == "near_field" else ("",):
            found = [stage_seconds(stage, call[stage], gpu, near) for call in calls]
            fixed = stage != "near_field"
            lines.append(line(f"{stage} {near}".strip(), [f[:2] for f in (found[:1] if fixed else found)], ("at every density; " if fixed else "") + found[-1][2]))
    for near in gpu.near:
        both = [whole(shape, density, gpu, near, iterations) for density in densities]
        lines.append(line(f"whole call, {near}", both))
        lines.append(f"{'  times faster':24}" + "".join(f"{dense_floor / f:8.1f} /{dense_time / e:7.1f}" for f, e in both))
    lines += [
        line("dense", [(dense_floor, dense_time)]),
        f"{launches(calls[0])} Triton + {TORCHS} torch launches ({1000 * LAUNCH * (launches(calls[0]) + TORCHS):.2f} ms, counted above); the near field gathers "
        + ", ".join(f"{gathered_bytes(shape, density) / 1e9:.0f}" for density in densities)
        + " GB",
    ]
    return "\n".join(lines)
