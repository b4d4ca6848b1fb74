"""What a sparse call has to do at least: operations and bytes of each stage, the floor time, and the expected time.

Counts follow from the method, not from the kernels: every input read once, every output written once, but for the keys
and values of the attention, which each tile of queries reads anew (out of L2, mostly).
"""

from dataclasses import dataclass, replace

from shapes import HEAD_DIM, Shape

# bf16 FLOP/s of a large product, bytes/s of a copy. H200: measured; the others: the vendor's datasheets, so never reached.
GPUS = {
    "H200": (788e12, 4.3e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.04e12),
    "RTX 5090": (209e12, 1.79e12),
    "RTX 4090": (165e12, 1.01e12),
    "RTX 3090": (71e12, 0.94e12),
}
# Share of the floor's speed that is expected of each stage, and why, in NOTES.md.
EXPECTED = {"dense": 0.75, "k-means": 0.5, "block map": 0.25, "attention": 0.5, "compensation": 0.6}
HIGH, LOW = 128, 64  # rows of the two query tiles
# What the kernels for Hopper are expected to reach (nothing of them is measured): bytes/s out of L2, the share of the
# tensor cores' speed that a good warp-specialised kernel keeps, the price of doing both at once, and the time during which
# a multiprocessor changes from one query tile to the next.
HOPPER = ("H200", "H100")
L2, TENSOR_SHARE, TOGETHER, CHANGE, MULTIPROCESSORS = 5.5e12, 0.83, 1.1, 2e-6, 132
HOPPER_KEYS = 128  # of a tile of keys


@dataclass(frozen=True)
class Floor:
    """flops: of the tensor cores; bytes: of device memory."""

    flops: float
    bytes: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        return max(self.flops / flops, self.bytes / bandwidth)


def dense(shape: Shape) -> Floor:
    return Floor(4 * shape.tokens**2 * HEAD_DIM * shape.heads, 4 * 2 * shape.tokens * HEAD_DIM * shape.heads)


def padded_rows(shape: Shape) -> float:
    """Query rows in tiles: a cluster's last rows fill a low tile or most of a high one, by 32 rows too many on average."""
    return shape.video + shape.q_clusters * LOW / 2


def stages(shape: Shape, density: float, iterations: int = 2, compensation: bool = True) -> dict[str, Floor]:
    """Floors of the stages of one warm call at `density`, in the order they run."""
    n, d, h, c = shape.video, HEAD_DIM, shape.heads, shape.q_clusters + shape.k_clusters
    tokens = 2 * 2 * n * d * h  # q and k, bf16
    labels = 2 * 3 * 4 * n * h  # of q and k: written, sorted, read
    steps = Floor(iterations * 2 * n * c * d * h, iterations * (2 * tokens + labels))  # assignment reads, means read
    pairs = shape.q_clusters * shape.k_clusters * h
    block_map = Floor(2 * pairs * d, pairs * (4 + 4 + 1))
    rows = padded_rows(shape)
    # Video queries to the selected keys and the text; text queries to everything.
    logits = rows * (density * n + shape.text) + shape.text * shape.tokens
    attention = Floor(4 * logits * d * h, 4 * 2 * shape.tokens * d * h)
    result = {"k-means": steps, "block map": block_map, "attention": attention}
    if compensation:
        stand_ins = (1 - density) * shape.k_clusters  # about: the skipped clusters, all equally large
        result["compensation"] = Floor(4 * rows * stand_ins * d * h, 2 * n * d * h)  # and the means of v
    return result


def gathered_bytes(shape: Shape, density: float) -> float:
    """Keys and values that the tiles read, from L2 if it holds a head's: what the floor above leaves out."""
    return padded_rows(shape) / HIGH * density * shape.video * 2 * 2 * HEAD_DIM * shape.heads


@dataclass(frozen=True)
class HopperAttention:
    """One call of the attention kernels for Hopper, stand-ins included where asked for, tile padding always. flops: of the
    tensor cores; gathered: bytes of keys and values, once for each query tile; tiles: of queries, over all heads."""

    flops: float
    gathered: float
    tiles: float

    def floor(self, flops: float) -> float:
        """Seconds, whichever of the tensor cores and L2 is slower."""
        return max(self.flops / flops, self.gathered / L2)

    def expected(self, flops: float) -> float:
        busy = TOGETHER * max(self.flops / flops / TENSOR_SHARE, self.gathered / L2)
        return busy + self.tiles * CHANGE / MULTIPROCESSORS


def hopper_attention(shape: Shape, density: float, compensation: bool = True) -> HopperAttention:
    """Of the video's queries. A low tile multiplies half of what a high one does and reads as much."""
    keys = density * shape.video + HOPPER_KEYS / 2  # the last tile of keys is half empty
    for more in (shape.text, (1 - density) * shape.k_clusters if compensation else 0):
        keys += more + HOPPER_KEYS / 2 if more else 0
    tiles = (shape.video / HIGH + shape.q_clusters / 2) * shape.heads
    return HopperAttention(4 * padded_rows(shape) * keys * HEAD_DIM * shape.heads, tiles * keys * 4 * HEAD_DIM, tiles)


def hopper_table(shape: Shape, densities, q_clusters, gpu: str) -> str:
    """For people: milliseconds of those kernels, floor / expected, without and with stand-ins; and the share of
    density x the expected dense attention that they reach."""
    peak = GPUS[gpu][0]
    dense_time = dense(shape).seconds(*GPUS[gpu]) / EXPECTED["dense"]
    lines = [f"attention by cuda_fa3, {shape.name} on one {gpu}: milliseconds, floor / expected, then with stand-ins"]
    for count in q_clusters:
        for density in densities:
            calls = [hopper_attention(replace(shape, q_clusters=count), density, tail) for tail in (False, True)]
            floors = "   ".join(f"{1000 * c.floor(peak):6.1f} / {1000 * c.expected(peak):5.1f}" for c in calls)
            share = density * dense_time / calls[0].expected(peak)
            lines.append(
                f"{count} query clusters, density {density:<5}{floors}   {calls[0].flops / 1e12:.1f} TFLOP, "
                f"{calls[0].gathered / 1e9:.0f} GB gathered, {share:.2f} of density x dense"
            )
    return "\n".join(lines)


def table(shape: Shape, densities, gpu: str) -> str:
    """For people: floor and expected milliseconds of every stage, and the speed-up they make."""
    speeds = GPUS[gpu]

    def both(name: str, floor: Floor) -> tuple[float, float]:
        seconds = 1000 * floor.seconds(*speeds)
        return seconds, seconds / EXPECTED[name]

    dense_floor, dense_time = both("dense", dense(shape))
    lines = [
        f"{shape.name} on one {gpu}: {shape.heads} heads, {shape.video:,} video + {shape.text} text tokens, "
        f"{shape.q_clusters}/{shape.k_clusters} clusters; milliseconds, floor / expected",
        f"{'dense':14}{dense_floor:9.1f} / {dense_time:.1f}",
    ]
    for density in densities:
        parts = {name: both(name, floor) for name, floor in stages(shape, density).items()}
        floor, expected = (sum(part[i] for part in parts.values()) for i in range(2))
        stages_text = ", ".join(f"{name} {a:.1f} / {b:.1f}" for name, (a, b) in parts.items())
        lines.append(
            f"density {density:<5}{floor:9.1f} / {expected:.1f}   {dense_floor / floor:.1f}x / {dense_time / expected:.1f}x"
            f"   {stages_text}; gathers {gathered_bytes(shape, density) / 1e9:.0f} GB"
        )
    return "\n".join(lines)
