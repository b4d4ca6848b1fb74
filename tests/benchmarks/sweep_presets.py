"""The sweep behind the presets: settings against density, error and PSNR of whole samples of the shipped checkpoint.

    python tests/benchmarks/sweep_presets.py

Each row samples the demo's video once (one seed) in 20 Euler steps and compares it with the dense sample. "cost" counts
attention work relative to dense, over all steps and blocks: dense calls 1; sparse calls their density, plus Ck/N for the
stand-ins. Clustering is not in it. Writes presets.md. On one CPU core ten minutes.
"""

import sys
from pathlib import Path

from common import markdown, start

BASE = {"compensation": "centroid", "kmeans_init_iters": 10, "kmeans_iters": 2, "dense_blocks": "0", "warmup_steps": 2,
        "min_k_ratio": 0.03, "top_p": 0.5}  # fmt: skip

# One idea per group; every row changes only what it names.
GROUPS = {
    "top_p": [{"top_p": p} for p in (0.3, 0.5, 0.7, 0.85)],
    "warm-up steps": [{"warmup_steps": w} for w in (1, 4)],
    "dropped instead (the paper's way)": [{"compensation": "off", "top_p": p} for p in (0.7, 0.9)],
    "dense blocks": [{"dense_blocks": ""}],
    "least share of key clusters": [{"min_k_ratio": r, "top_p": 0.3} for r in (0.0, 0.1)],
    "key clusters (N = 3,120; 98 otherwise)": [{"k_clusters": k} for k in (48, 195)],
    "query clusters (61 otherwise)": [{"q_clusters": q} for q in (30, 122)],
    "k-means iterations": [{"kmeans_init_iters": i, "kmeans_iters": j} for i, j in ((2, 1), (50, 2))],
}
HEADER = ["settings", "density", "sparse calls", "cost", "rel. L2 of the latent", "PSNR, dB"]


def main() -> None:
    start()
    import demo_video
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention
    from svg2_pack.svg2_core.metrics import psnr, rel_l2

    model = demo_video.model()
    dense = demo_video.sample(model)
    sections = []
    for title, variants in GROUPS.items():
        rows = []
        for variant in variants:
            settings = {**BASE, **variant}
            patched, stats = SVG2SparseAttention.execute(model, min_tokens=0, **settings).result
            sample = demo_video.sample(patched)
            report = stats.latest()
            stand_ins = settings.get("k_clusters", 98) / report.tokens * (settings["compensation"] != "off")
            cost = 1 - report.sparse_share * (1 - report.density - stand_ins)
            db = psnr(demo_video.frames(sample), demo_video.frames(dense))
            named = ", ".join(f"{k}={v!r}" for k, v in variant.items())
            rows.append([named, f"{report.density:.1%}", f"{report.sparse_share:.0%}", f"{cost:.2f}",
                         f"{rel_l2(sample, dense):.3f}", f"{db:.1f}"])  # fmt: skip
            print(title, rows[-1], file=sys.stderr, flush=True)
        sections.append(f"## {title}\n\n{markdown(HEADER, rows)}\n")
    base = ", ".join(f"{k}={v!r}" for k, v in BASE.items())
    intro = f"# Preset sweep\n\nMade by `sweep_presets.py`; what is measured stands there. Unless a row says otherwise: {base}.\n"
    Path(__file__).with_name("presets.md").write_text("\n".join([intro, *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()
