"""Error of one call by the far field's order, from the demo's size to Wan's 720p, and how well it is foretold and measured.

    python tests/benchmarks/far_field.py --captures DIR [--tokens 3120 12480 32760 75600]

Heads as in quality.py: captured ones (capture.py makes them) where there are captures of that length, else the generated ones
that stand for them, in fp32. Clusters as the balanced preset makes them from a cold start; pairs chosen by expected error.
Relative L2 error over 1,000 random query rows of a head (500 at 75,600 tokens). "measured" is what a call itself reports,
from 32 exact rows; "foretold" what its moments say. Results go into results/far_field.csv, the tables into QUALITY.md.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from common import RESULTS, ROOT, load_pack, markdown, read_rows, replace_rows, write_table
from quality import ROWS, arguments, captured, exact_rows, generated, rel_l2, sample_rows

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2)
WAYS = ("centroids", "first order, masses alone", "first order")
FILE = RESULTS / "far_field.csv"


@torch.no_grad()
def measure(head, index: int) -> list[dict]:
    """Rows of one head: for each way and density, its errors."""
    from svg2_pack.svg2_core import Layout
    from svg2_pack.svg2_core import attention as stages
    from svg2_pack.svg2_core.presets import preset_config

    n, d = head.q.shape
    config, layout, of_groups = preset_config("balanced", "wan_t2v"), Layout(0, n), {"scale": d**-0.5, "backend": "torch"}
    rows = sample_rows(n, ROWS if n < 50_000 else ROWS // 2)
    truth = exact_rows(head, rows, d**-0.5)
    q, k, v = (x[None, None].contiguous() for x in (head.q, head.k, head.v))
    q_groups, k_groups, _ = stages.cluster(q, k, [None], config, first_head=index, **of_groups)
    known = stages.moments(q, k, v, q_groups, k_groups, directions=config.variance_directions, **of_groups)
    exact = stages.exact_rows(q, k, v, layout, scale=d**-0.5, seed=config.seed, first_head=index)
    without = known._replace(directions=known.directions[..., :0], direction_variances=known.direction_variances[..., :0])
    found = []
    for density in DENSITIES:
        selected, foretold = stages.select_by_error(q_groups, k_groups, known, density=density, **of_groups)
        near, logsumexp = stages.near_field(q, k, v, q_groups, k_groups, selected, layout=layout, **of_groups)
        got = stages.exact_pairs(q_groups, k_groups, selected).item() / n**2
        for way, order, moments in zip(WAYS, (0, 1, 1), (known, without, known), strict=True):
            out = near.clone()
            stages.far_field(q, k, v, out, logsumexp, q_groups, k_groups, moments, selected, layout=layout, order=order, exact=exact, **of_groups)  # fmt: skip
            error, norm = stages.squared_error(exact, out, layout)[0, 0].tolist()
            expected = exact.rows.shape[1] * foretold.item() ** 2
            found.append({"way": way, "target": density, "density": round(got, 5), "rel_l2": round(rel_l2(out[0, 0, rows], truth), 5),
                          "measured": round((error / norm) ** 0.5, 5), "foretold": round((expected / norm) ** 0.5, 5)})  # fmt: skip
    return found


def run(captures: Path | None, tokens: int) -> None:
    there = captures is not None and any(captures.glob(f"*_{tokens}_*.safetensors"))
    source = "captured" if there else "generated"
    heads = captured(captures, tokens) if there else generated(tokens, heads=6)
    rows = []
    for index, head in enumerate(heads):
        began = time.time()
        rows += [{"source": source, "tokens": tokens, "head": index, **row} for row in measure(head, index)]
        print(source, tokens, index, f"{time.time() - began:.0f} s", rows[-1], file=sys.stderr, flush=True)
    replace_rows(FILE, rows, ("tokens",))


def error_table(rows: list[dict]) -> str:
    lines = []
    for tokens in sorted({int(row["tokens"]) for row in rows}):
        mine = [row for row in rows if int(row["tokens"]) == tokens]
        for way in WAYS:
            cells = []
            for density in DENSITIES:
                errors = [float(row["rel_l2"]) for row in mine if row["way"] == way and float(row["target"]) == density]
                cells.append(f"{statistics.mean(errors):.3f} ({max(errors):.2f})")
            lines.append([f"{tokens:,}", mine[0]["source"], way, *cells])
    return markdown(["tokens", "heads", "far field", *(f"density {d:g}" for d in DENSITIES)], lines)


def signal_table(rows: list[dict]) -> str:
    """Of first order: rank correlation of the foretold error with the true one, over heads and densities and over heads alone,
    and how far the measured error is from the true one."""
    lines = []
    for tokens in sorted({int(row["tokens"]) for row in rows}):
        mine = [row for row in rows if int(row["tokens"]) == tokens and row["way"] == "first order"]
        at = [[row for row in mine if float(row["target"]) == d] for d in DENSITIES]
        off = [abs(float(row["measured"]) / float(row["rel_l2"]) - 1) for row in mine]
        alone = statistics.mean(rank_correlation(some) for some in at)
        lines.append([f"{tokens:,}", f"{len(mine)}", f"{rank_correlation(mine):.2f}", f"{alone:.2f}", f"{statistics.mean(off):.0%}, {max(off):.0%}"])
    return markdown(["tokens", "heads x densities", "rank correlation of foretold and true error", "the same among heads at one density",
                     "measured against true error: mean, largest difference"], lines)  # fmt: skip


def rank_correlation(rows: list[dict]) -> float:
    true, foretold = (torch.tensor([float(row[c]) for row in rows]).argsort().argsort().double() for c in ("rel_l2", "foretold"))
    return torch.corrcoef(torch.stack([true, foretold]))[0, 1].item()


def main() -> None:
    args = arguments(__doc__).parse_args()
    load_pack()
    if not args.tables:
        for tokens in args.tokens:
            run(args.captures, tokens)
    page, rows = ROOT / "tests" / "benchmarks" / "QUALITY.md", read_rows(FILE)
    write_table(page, "far_field", error_table(rows))
    write_table(page, "signal", signal_table(rows))


if __name__ == "__main__":
    main()
