"""The sweep behind the presets: settings against density, error and PSNR of whole samples of the shipped checkpoint.

    python tests/benchmarks/sweep_presets.py [--clip bunny] [--seed 1]     # these alone; then --table for the page

Each row samples 20 Euler steps of 3,120 tokens, in two clips (the demo's, from its first frame; "bikes", from text alone)
with two seeds each, and compares with the dense sample. "work" counts attention relative to dense, over all steps and
blocks: dense calls 1; sparse calls their density, Ck/N for the stand-ins and Cq/N for the moments. Clustering is not in it.
Results go into results/presets.csv, presets.md is made from them. On one CPU core half a minute a sample.
"""

import argparse
import contextlib
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from common import RESULTS, markdown, read_rows, replace_rows, start

CLIPS = {"bunny": {}, "bikes": {"prompt": "bikes", "with_image": False}}
SEEDS = (1, 2)
FILE = RESULTS / "presets.csv"

# What it was before the far field of first order.
BEFORE = {"top_p": 0.5, "min_k_ratio": 0.03, "compensation": "centroid", "metric_directions": 0, "k_clusters": 98, "kmeans_init_iters": 10,
          "kmeans_iters": 2, "dense_blocks": "0", "warmup_steps": 2}  # fmt: skip

# One idea per group; every row changes only what it names, of the balanced preset. Names of the node's inputs, or of
# SVG2Config's fields; "frozen" keeps the first sparse step's metric, "share" the whole matrix A in place of the fitted share.
GROUPS = {
    "Presets": [{"preset": p} for p in ("quality", "balanced", "turbo", "paper")],
    "Before (Euclidean clusters, rule of mass, centroids)": [{**BEFORE, "top_p": p} for p in (0.7, 0.5, 0.3)],
    "Density": [{"density": d} for d in (0.01, 0.03, 0.09, 0.2)],
    "Block 0: its share, or dense": [*({"first_block_share": s} for s in (1.0, 2.0, 2.5)), {"dense_blocks": "0"}],
    "Warm-up": [*({"warmup_steps": w} for w in (1, 2, 4)), {"warmup_steps": 2, "dense_blocks": "0"}],
    "Key clusters (195)": [{"k_clusters": k} for k in (49, 98, 390)],
    "Query clusters (61)": [{"q_clusters": q} for q in (30, 122)],
    "k-means (8 + 1)": [{"kmeans_init_iters": i, "kmeans_iters": j} for i, j in ((2, 1), (8, 2), (20, 1))],
    "Far field": [{"compensation": "centroid"}, {"compensation": "off"}, *({"variance_directions": m} for m in (0, 8, 32)), {"share": 1}],
    "Metric (32 directions, renewed at each step)": [*({"metric_directions": r} for r in (0, 16, 64)), {"frozen": True}],
    "Rule of mass in place of errors": [{"top_p": p, "min_k_ratio": 0.0} for p in (0.15, 0.3)],
}  # fmt: skip
HEADER = ["settings", "density", "sparse calls", "work", "attention error", "PSNR, dB: bunny, seeds 1 and 2", "bikes", "mean"]


@contextlib.contextmanager
def settings(variant: dict):
    """The node's inputs for a variant; what the node has no input for is changed while this is entered."""
    import svg2_pack.nodes.sparse_attention as node
    from svg2_pack.nodes.patching import knobs
    from svg2_pack.svg2_core.config import SVG2Config
    from svg2_pack.svg2_core.ops.far_field import reference
    from svg2_pack.svg2_core.ops.kmeans import metric

    inputs = dict(variant)
    before = knobs.preset_config, metric.spaces, reference.StandIns.fit_coefficient
    fields = {name: inputs.pop(name) for name in list(inputs) if name not in _inputs(node) and name in SVG2Config.__dataclass_fields__}
    knobs.preset_config = lambda *names: replace(before[0](*names), **fields)
    if inputs.pop("frozen", False):
        metric.spaces = _frozen(metric.spaces)
    if (share := inputs.pop("share", None)) is not None:
        reference.StandIns.fit_coefficient = lambda *args: float(share)
    try:
        yield inputs
    finally:
        knobs.preset_config, metric.spaces, reference.StandIns.fit_coefficient = before


def _inputs(node) -> set[str]:
    return {item.id for item in node.SVG2SparseAttention.GET_SCHEMA().inputs}


def _frozen(anew):
    """Spaces of the past kept as they are."""
    import torch
    from svg2_pack.svg2_core.ops.kmeans.metric import Space

    def spaces(q, k, rank, scale, past=(None, None)):
        if past[0] is None:
            return anew(q, k, rank, scale)
        return tuple(Space(p.float(), torch.eye(p.shape[1])) for p in past)

    return spaces


def run(clip: str, seed: int) -> None:
    import demo_video
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention
    from svg2_pack.svg2_core.metrics import psnr

    model, case = demo_video.model(), demo_video.conditioning(**CLIPS[clip])
    dense = demo_video.frames(demo_video.sample(model, seed=seed, case=case))
    for variant in (variant for variants in GROUPS.values() for variant in variants):
        with settings(variant) as inputs:
            patched, stats = SVG2SparseAttention.execute(model, min_tokens=0, **inputs).result
            frames = demo_video.frames(demo_video.sample(patched, seed=seed, case=case))
        report = stats.latest()
        stand_ins = report.settings["k_clusters"] / report.tokens * (report.settings["compensation"] != "off")
        moments = report.settings["q_clusters"] / report.tokens * (report.settings["compensation"] == "first_order")
        row = {"settings": json.dumps(variant), "clip": clip, "seed": seed, "density": round(report.density, 5),
               "sparse": round(report.sparse_share, 4), "error": round(report.error, 5), "psnr": round(psnr(frames, dense), 3),
               "work": round(1 - report.sparse_share * (1 - report.density - stand_ins - moments), 4)}  # fmt: skip
        replace_rows(FILE, [row], ("settings", "clip", "seed"))
        print(clip, seed, row, file=sys.stderr, flush=True)


def page() -> str:
    rows, sections = read_rows(FILE), []
    for title, variants in GROUPS.items():
        lines = []
        for variant in variants:
            mine = [row for row in rows if row["settings"] == json.dumps(variant)]
            if not mine:
                continue

            def mean(column, mine=mine):
                return statistics.mean(float(row[column]) for row in mine)

            def clip(name, mine=mine):
                found = {int(row["seed"]): row["psnr"] for row in mine if row["clip"] == name}
                return ", ".join(f"{float(found[seed]):.1f}" for seed in sorted(found))

            named = ", ".join(f"{k}={v!r}" for k, v in variant.items())
            lines.append([named, f"{mean('density'):.1%}", f"{mean('sparse'):.0%}", f"{mean('work'):.2f}", f"{mean('error'):.3f}",
                          clip("bunny"), clip("bikes"), f"{mean('psnr'):.1f}"])  # fmt: skip
        sections.append(f"## {title}\n\n{markdown(HEADER, lines)}\n")
    intro = "# Preset sweep\n\nMade by `sweep_presets.py`; what is measured stands there. Each row changes what it names of `balanced`.\n"
    return "\n".join([intro, *sections])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", nargs="+", choices=CLIPS, default=list(CLIPS))
    parser.add_argument("--seed", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="only make presets.md from the results")
    args = parser.parse_args()
    if not args.table:
        start()
        for clip in args.clip:
            for seed in args.seed:
                run(clip, seed)
    Path(__file__).with_name("presets.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
