"""Error of one attention call against density, for ways to group tokens and to treat the pairs that are skipped.

    python tests/benchmarks/quality.py --captures DIR [--tokens 32760] [--extras]

On captures (capture.py makes them) and on what activations.py generates in their place; a CPU does. The error is that
of 1,000 random query rows of a head (500 at 75,600 tokens) against exact attention, both in fp32,
`norm(out - exact) / norm(exact)` over these rows; the mean over the heads is reported. Density is that of the whole
head: every grouping takes its key groups by estimated mass (svg2_core's select_by_mass; centroids, or means of position
blocks) with the top_p that reaches the density asked for. Results go into results/quality*.csv, replacing the rows of
the same tokens, and the tables of QUALITY.md are made from those files. `--tables` makes the tables only.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from common import RESULTS, load_pack, markdown, read_rows, replace_rows, write_table
from verify import rel_l2

DENSITIES = (0.05, 0.1, 0.2, 0.3)
ROWS = 1000
ITERATIONS = 10  # of k-means, from a cold start
_CHUNK = 100  # rows at a time: 30 MB of logits at 75,600 tokens


class Head(NamedTuple):
    """One head: q, k, v fp32 `[N, D]`, tokens in order of the grid (T, H, W)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grid: tuple[int, int, int]


class Groups(NamedTuple):
    """A partition of the tokens: labels int64 `[N]`, sizes int64 `[C]`, means fp32 `[C, D]`."""

    labels: torch.Tensor
    sizes: torch.Tensor
    means: torch.Tensor


def sample_rows(n: int, rows: int = ROWS) -> torch.Tensor:
    """The query rows looked at, int64 `[rows]`: the same in every measurement at `n` tokens."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))[:rows]


def group_by(x: torch.Tensor, labels: torch.Tensor) -> Groups:
    """Groups of x `[N, D]` by labels `[N]`."""
    sizes = torch.bincount(labels)
    return renewed(x, Groups(labels, sizes, torch.empty(len(sizes), x.shape[1])))


def renewed(x: torch.Tensor, groups: Groups) -> Groups:
    """The same partition with the means of x `[N, D]`."""
    means = torch.zeros_like(groups.means).index_add_(0, groups.labels, x) / groups.sizes[:, None].clamp(min=1)
    return Groups(groups.labels, groups.sizes, means)


def by_kmeans(
    x: torch.Tensor, clusters: int, role: int, head: int = 0, iterations: int = ITERATIONS, init=None
) -> Groups:
    """SVG2's clusters of x `[N, D]`, by svg2_core's reference from a cold start (or from `init` `[C, D]`)."""
    from svg2_pack.svg2_core.ops.kmeans import kmeans

    init = None if init is None else init[None, None]
    found = kmeans(x[None, None], clusters, iterations=iterations, role=role, first_head=head, init=init)
    sizes = found.sizes[0, 0].long()
    labels = torch.empty(len(x), dtype=torch.int64)
    labels[found.order[0, 0].long()] = torch.repeat_interleave(sizes)
    return Groups(labels, sizes, found.centroids[0, 0])


def strips(grid: tuple[int, int, int]) -> torch.Tensor:
    """Labels of runs of 64 tokens in sequence, int64 `[N]`."""
    return torch.arange(math.prod(grid)) // 64


def cubes(grid: tuple[int, int, int], edge: int = 4) -> torch.Tensor:
    """Labels of boxes of about 4 x 4 x 4 tokens, int64 `[N]`; each axis is cut into equal parts as near to 4 as goes."""
    label = torch.zeros(grid, dtype=torch.int64)
    for axis, n in enumerate(grid):
        parts = max(1, round(n / edge))
        shape = [1, 1, 1]
        shape[axis] = n
        label = label * parts + (torch.arange(n) * parts // n).view(shape)
    return label.flatten()


def select(q: Groups, k: Groups, scale: float, density: float) -> tuple[torch.Tensor, float]:
    """svg2_core's select_by_mass (bool `[Cq, Ck]`) with the top_p that gives `density`, and the density it has."""
    from svg2_pack.svg2_core.ops.select.reference import select_by_mass

    low, high, pairs = 0.0, 1.0, float(q.sizes.sum() * k.sizes.sum())
    for _ in range(14):
        top_p = (low + high) / 2
        chosen = select_by_mass(q.means[None, None], k.means[None, None], k.sizes[None, None], top_p, 0, scale)[0, 0]
        got = (q.sizes.double() @ (chosen.double() @ k.sizes.double())).item() / pairs
        if abs(got - density) < 0.01 * density:
            break
        low, high = (top_p, high) if got < density else (low, top_p)
    return chosen, got


def sparse(head: Head, rows, q: Groups, k: Groups, maps: list, scale: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention of some rows for each map of chosen pairs: fp32 `[rows, D]` with skipped pairs dropped, and with stand-ins."""
    values = renewed(head.v, k).means
    found = [([], []) for _ in maps]
    for part in rows.split(_CHUNK):
        logits = scale * head.q[part] @ head.k.T
        stand_ins = scale * head.q[part] @ k.means.T + k.sizes.float().log()
        top = torch.maximum(logits.amax(1), stand_ins.amax(1))[:, None]
        weights, stand_ins = logits.sub_(top).exp_(), stand_ins.sub_(top).exp_()
        for chosen, (dropped, stood_in) in zip(maps, found, strict=True):
            mine = chosen[q.labels[part]].float()
            exact = mine.index_select(1, k.labels).mul_(weights)
            tail = stand_ins * (1 - mine)
            out, mass = exact @ head.v, exact.sum(1, keepdim=True)
            dropped.append(out / mass.clamp(min=1e-30))
            stood_in.append((out + tail @ values) / (mass + tail.sum(1, keepdim=True)))
    return [(torch.cat(dropped), torch.cat(stood_in)) for dropped, stood_in in found]


def exact_rows(head: Head, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Exact attention of some rows, fp32 `[rows, D]`."""
    return torch.cat([(scale * head.q[part] @ head.k.T).softmax(-1) @ head.v for part in rows.split(_CHUNK)])


def errors(head: Head, rows, truth, q: Groups, k: Groups, densities=DENSITIES, select=select) -> list[dict]:
    """Rows of a table: for each density, the errors with skipped pairs dropped and with stand-ins."""
    scale = head.q.shape[1] ** -0.5
    maps = [select(q, k, scale, density) for density in densities]
    outs = sparse(head, rows, q, k, [chosen for chosen, _ in maps], scale)
    return [
        {"target": density, "density": round(got, 5), "dropped": round(rel_l2(dropped, truth), 5), "stand_in": round(rel_l2(stood_in, truth), 5)}
        for density, (_, got), (dropped, stood_in) in zip(densities, maps, outs, strict=True)
    ]  # fmt: skip


def structure(head: Head, rows: torch.Tensor, q: Groups, k: Groups) -> dict[str, float]:
    """What tells one head's structure: how well its clusters hold it, how their sizes differ, how its attention spreads."""
    scale, result = head.q.shape[1] ** -0.5, {}
    for name, x, groups in (("q", head.q, q), ("k", head.k, k), ("v", head.v, k)):
        # Share of the variance that is left within clusters (v: within the keys' clusters).
        total = (x - x.mean(0)).pow(2).sum()
        result[f"within_{name}"] = ((x - renewed(x, groups).means[groups.labels]).pow(2).sum() / total).item()
        spectrum = torch.linalg.svdvals(x - x.mean(0)).square()
        for directions in (8, 32):
            result[f"top{directions}_{name}"] = (spectrum[:directions].sum() / total).item()
    for name, groups in (("q", q), ("k", k)):
        sizes = groups.sizes.sort(descending=True).values / groups.sizes.float().mean()
        for percent in (5, 25, 50, 75, 95):  # of the clusters, largest first: size relative to the mean size
            result[f"size{percent}_{name}"] = sizes[int(percent / 100 * len(sizes))].item()
    mass = torch.cat(
        [
            (scale * head.q[part] @ head.k.T).softmax(-1).sort(descending=True)[0].cumsum(1)
            for part in rows[:200].split(50)
        ]
    )
    for p in (0.5, 0.9):  # share of the keys that hold p of a row's attention
        result[f"keys_for_{p}"] = ((mass < p).sum(1) + 1).float().mean().item() / len(head.k)
    return {name: round(value, 5) for name, value in result.items()}


def cluster_counts(tokens: int) -> tuple[int, int]:
    """Query and key clusters that all of these tables have: the published counts, with 32 tokens a key cluster where that is fewer."""
    from svg2_pack.svg2_core import SVG2Config

    return SVG2Config(tokens_per_k_cluster=32.0).cluster_counts(tokens)


def clustered(head: Head, index: int) -> tuple[Groups, Groups]:
    c_q, c_k = cluster_counts(len(head.q))
    return by_kmeans(head.q, c_q, 0, index), by_kmeans(head.k, c_k, 1, index)


def measure(head: Head, index: int, rows: int = ROWS, positions: bool = True) -> tuple[list[dict], dict]:
    """Errors of every grouping, and the structure, of one head."""
    rows = sample_rows(len(head.q), rows)
    truth = exact_rows(head, rows, head.q.shape[1] ** -0.5)
    q, k = clustered(head, index)
    table = [{"grouping": "clusters", **row} for row in errors(head, rows, truth, q, k)]
    for name, cut in (("strips", strips), ("cubes", cubes)) if positions else ():
        labels = cut(head.grid)
        found = errors(head, rows, truth, group_by(head.q, labels), group_by(head.k, labels))
        table += [{"grouping": name, **row} for row in found]
    return table, structure(head, rows, q, k)


def captured(captures: Path, tokens: int):
    """The captured heads that activations.py starts from, in its order."""
    from capture import GRIDS, load_head, stored_heads

    for clip, *rest in stored_heads():
        yield Head(*load_head(captures, clip, tokens, *rest), GRIDS[tokens])


def generated(tokens: int, grid=None, heads: int = 12, seed: int = 0):
    """The generated heads that stand for them, in bf16 as a benchmark takes them."""
    from activations import activations
    from capture import GRIDS

    grid = grid or GRIDS[tokens]
    for x in zip(*(x[0] for x in activations(grid, heads, seed=seed)), strict=True):
        yield Head(*(part.float() for part in x), grid)


def run(captures: Path, tokens: int) -> None:
    for source, heads in (("captured", captured(captures, tokens)), ("generated", generated(tokens))):
        table, structures = [], []
        for index, head in enumerate(heads):
            began = time.time()
            found, shape = measure(head, index, ROWS if tokens < 50_000 else ROWS // 2)
            table += [{"source": source, "tokens": tokens, "head": index, **row} for row in found]
            structures.append({"source": source, "tokens": tokens, "head": index, **shape})
            print(source, tokens, index, f"{time.time() - began:.0f} s", found[0], file=sys.stderr, flush=True)
        save("quality.csv", table, ("source", "tokens"))
        save("quality_structure.csv", structures, ("source", "tokens"))


def by_threshold(scores: torch.Tensor):
    """A rule for `errors` that takes the pairs with the highest scores `[Cq, Ck]` of the whole head."""

    def rule(q: Groups, k: Groups, scale: float, density: float):
        cost = (q.sizes[:, None] * k.sizes).flatten().double()
        order = scores.flatten().argsort(descending=True)
        share = cost[order].cumsum(0) / cost.sum()
        count = int((share <= density).sum())
        chosen = torch.zeros(scores.numel(), dtype=torch.bool)
        chosen[order[:count]] = True
        return chosen.view_as(scores), share[count - 1].item()

    return rule


def choice_rules(head: Head, q: Groups, k: Groups) -> dict:
    """Ways to choose pairs at a density: the paper's, and the whole head's best by mass or by expected error per key."""
    scale = head.q.shape[1] ** -0.5
    mass = (scale * q.means @ k.means.T + k.sizes.float().log()).softmax(-1)
    logits = scale * q.means @ head.k.T
    sums = [torch.zeros(len(mass), len(k.sizes)).index_add_(1, k.labels, x) for x in (logits, logits.square())]
    first, second = (x / k.sizes.clamp(min=1) for x in sums)
    deviation = (second - first.square()).clamp(min=0).sqrt()
    off = (head.v - renewed(head.v, k).means[k.labels]).pow(2).sum(1)
    spread = (torch.zeros(len(k.sizes)).index_add_(0, k.labels, off) / k.sizes.clamp(min=1)).sqrt()
    return {
        "mass, top-p of each query cluster (the paper)": select,
        "mass per key, one threshold per head": by_threshold(mass / k.sizes.clamp(min=1)),
        "expected error per key, one threshold per head": by_threshold(
            mass * deviation * spread / k.sizes.clamp(min=1)
        ),
    }


def extras(captures: Path, tokens: int = 32760, clip: str = "bunny") -> None:
    """Other ways to choose pairs, other cluster counts, clusters carried over from another noise level."""
    from capture import BLOCKS, CLIPS, GRIDS, SIGMAS, load_head

    rows, table, number = sample_rows(tokens, ROWS // 2), [], CLIPS.index(clip)
    c_q, c_k = cluster_counts(tokens)

    def add(experiment, variant, head, truth, q, k, **rule):
        where = {"experiment": experiment, "variant": variant, "tokens": tokens, "sigma": sigma, "block": block}
        table.extend({**where, **row} for row in errors(head, rows, truth, q, k, DENSITIES[:3], **rule))

    for sigma, block in ((sigma, block) for sigma in SIGMAS for block in BLOCKS):
        began = time.time()
        head = Head(*load_head(captures, clip, tokens, sigma, block, number), GRIDS[tokens])
        truth = exact_rows(head, rows, 128**-0.5)
        q, k = by_kmeans(head.q, c_q, 0), by_kmeans(head.k, c_k, 1)
        for name, rule in choice_rules(head, q, k).items():
            add("choice", name, head, truth, q, k, select=rule)
        for count in (500, 2000):
            add("key clusters", count, head, truth, q, by_kmeans(head.k, count, 1))
        add("key clusters", c_k, head, truth, q, k)

        # The same noise and picture a little later in sampling.
        later = Head(*load_head(captures, clip, tokens, round(sigma - 0.05, 2), block, number), GRIDS[tokens])
        truth = exact_rows(later, rows, 128**-0.5)
        add("carried over", "10 iterations, cold", later, truth, by_kmeans(later.q, c_q, 0), by_kmeans(later.k, c_k, 1))
        add("carried over", "labels kept, means renewed", later, truth,
            *(renewed(x, g) for x, g in ((later.q, q), (later.k, k))))  # fmt: skip
        for count in (1, 2):
            add("carried over", f"{count} warm iterations", later, truth,
                by_kmeans(later.q, c_q, 0, iterations=count, init=q.means), by_kmeans(later.k, c_k, 1, iterations=count, init=k.means))  # fmt: skip
        print("extras", sigma, block, f"{time.time() - began:.0f} s", file=sys.stderr, flush=True)
        save("quality_extras.csv", table, ("tokens", "experiment"))


def carried_far(captures: Path, tokens: int = 32760, clip: str = "bunny") -> None:
    """Clusters of the high noise level kept until the low one: most of sampling apart."""
    from capture import BLOCKS, CLIPS, GRIDS, SIGMAS, load_head

    rows, table, counts = sample_rows(tokens, ROWS // 2), [], cluster_counts(tokens)
    for block in BLOCKS:
        then, now = (
            Head(*load_head(captures, clip, tokens, sigma, block, CLIPS.index(clip)), GRIDS[tokens]) for sigma in SIGMAS
        )
        truth = exact_rows(now, rows, 128**-0.5)
        old, new = (
            [by_kmeans(x, c, role) for role, (x, c) in enumerate(zip(h[:2], counts, strict=True))] for h in (then, now)
        )
        kept = [renewed(x, groups) for x, groups in zip(now[:2], old, strict=True)]
        warm = [
            by_kmeans(x, len(g.means), role, iterations=2, init=g.means)
            for role, (x, g) in enumerate(zip(now[:2], old, strict=True))
        ]
        where = {"experiment": "carried far", "tokens": tokens, "sigma": SIGMAS[1], "block": block}
        for variant, (q, k) in (
            ("10 iterations, cold", new),
            ("labels kept, means renewed", kept),
            ("2 warm iterations", warm),
        ):
            table += [{**where, "variant": variant, **row} for row in errors(now, rows, truth, q, k, DENSITIES[:3])]
    save("quality_extras.csv", table, ("tokens", "experiment"))


def other_counts(captures: Path, tokens: int = 75600, clip: str = "bunny") -> None:
    """Other cluster counts where the preset's largest count of key clusters is what limits."""
    from capture import BLOCKS, CLIPS, GRIDS, SIGMAS, load_head

    rows, table = sample_rows(tokens, ROWS // 2), []
    for sigma, block in ((sigma, block) for sigma in SIGMAS for block in BLOCKS):
        began = time.time()
        head = Head(*load_head(captures, clip, tokens, sigma, block, CLIPS.index(clip)), GRIDS[tokens])
        truth = exact_rows(head, rows, 128**-0.5)
        qs, ks = ([by_kmeans(x, count, role) for count in counts]
                  for role, (x, counts) in enumerate(((head.q, (300, 600)), (head.k, (1000, 2000)))))  # fmt: skip
        where = {"experiment": "cluster counts", "tokens": tokens, "sigma": sigma, "block": block}
        for q, k in itertools.product(qs, ks):
            variant = {"variant": f"{len(q.sizes)} / {len(k.sizes)}"}
            table += [{**where, **variant, **row} for row in errors(head, rows, truth, q, k, DENSITIES[:3])]
        print("counts", sigma, block, f"{time.time() - began:.0f} s", file=sys.stderr, flush=True)
    save("quality_extras.csv", table, ("tokens", "experiment"))


def read(name: str) -> list[dict]:
    return read_rows(RESULTS / name)


def save(name: str, rows: list[dict], key: tuple[str, ...]) -> None:
    replace_rows(RESULTS / name, rows, key)


def mean(rows: list[dict], column: str, **key) -> float | None:
    """Mean of a column over the rows that have all of `key`; None if there are none."""
    values = [float(row[column]) for row in rows if all(row[k] == str(v) for k, v in key.items())]
    return statistics.mean(values) if values else None


def error_table(rows: list[dict]) -> str:
    lines = []
    for tokens in sorted({int(row["tokens"]) for row in rows}):
        for grouping in ("clusters", "strips", "cubes"):
            for column, name in (("dropped", "dropped"), ("stand_in", "mean stands in")):
                line = [
                    f"{tokens:,}",
                    {"clusters": "k-means", "strips": "64-token strips", "cubes": "4 x 4 x 4 cubes"}[grouping],
                    name,
                ]
                for density in DENSITIES:
                    both = [
                        mean(rows, column, source=s, tokens=tokens, grouping=grouping, target=density)
                        for s in ("captured", "generated")
                    ]
                    line.append(" / ".join("-" if x is None else f"{x:.3f}" for x in both))
                lines.append(line)
    return markdown(["tokens", "groups", "skipped pairs", *(f"density {d}" for d in DENSITIES)], lines)


def structure_table(rows: list[dict]) -> str:
    sizes = sorted({int(row["tokens"]) for row in rows})
    columns = [c for c in rows[0] if c not in ("source", "tokens", "head")]
    lines = []
    for column in columns:
        both = [[mean(rows, column, source=s, tokens=n) for s in ("captured", "generated")] for n in sizes]
        lines.append([column, *(" / ".join("-" if x is None else f"{x:.3f}" for x in pair) for pair in both)])
    return markdown(["captured / generated", *(f"{n:,} tokens" for n in sizes)], lines)


def extras_table(rows: list[dict]) -> str:
    lines = []
    for tokens, experiment, variant in dict.fromkeys(
        (row["tokens"], row["experiment"], row["variant"]) for row in rows
    ):
        cells = [
            [
                mean(rows, c, tokens=tokens, experiment=experiment, variant=variant, target=d)
                for c in ("dropped", "stand_in")
            ]
            for d in DENSITIES[:3]
        ]
        lines.append(
            [f"{int(tokens):,}", experiment, variant, *(" / ".join(f"{x:.3f}" for x in pair) for pair in cells)]
        )
    return markdown(["tokens", "what", "variant", *(f"density {d}" for d in DENSITIES[:3])], lines)


def tables() -> None:
    page = Path(__file__).with_name("QUALITY.md")
    if rows := read("quality_extras.csv"):
        write_table(page, "extras", extras_table(rows))
    write_table(page, "errors", error_table(read("quality.csv")))
    write_table(page, "structure", structure_table(read("quality_structure.csv")))


def arguments(description: str) -> argparse.ArgumentParser:
    """What every program that measures these heads takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captures", type=Path, help="folder of capture.py's captures")
    parser.add_argument("--tokens", type=int, nargs="*", default=[3120, 12480, 32760, 75600])
    parser.add_argument("--tables", action="store_true", help="only make QUALITY.md's tables from the results")
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--extras", action="store_true", help="also what is asked of one clip only")
    args = parser.parse_args()
    load_pack()
    if not args.tables:
        for tokens in args.tokens:
            run(args.captures, tokens)
    if args.extras:
        extras(args.captures)
        carried_far(args.captures)
        other_counts(args.captures)
    tables()


if __name__ == "__main__":
    main()
