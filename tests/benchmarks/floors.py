"""What a sparse call has to do at least: operations and bytes of each stage, the floor time, and the expected time.

Counts follow from the method, not from the kernels: every input read once, every output written once, but for the keys
and values of the attention, which each tile of queries reads anew (out of L2, mostly).
"""

from dataclasses import dataclass

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
