"""The sweep behind the presets: settings against density, error and PSNR of whole samples of the shipped checkpoint.

    python tests/benchmarks/sweep_presets.py

Each row samples two videos (the bunny from its frame; a text-only one) in 20 Euler steps and compares them with the
dense samples. "cost" counts attention work relative to dense, over all steps and blocks: dense calls 1; sparse calls
their density, plus Ck/N for the stand-ins. Clustering is not in it. Writes presets.md. On two CPU cores a quarter of an hour.
"""

import sys
from pathlib import Path

from common import markdown, start

BASE = {"compensation": "centroid", "kmeans_init_iters": 10, "kmeans_iters": 2, "dense_blocks": "0", "warmup_steps": 2,
        "min_k_ratio": 0.03, "top_p": 0.5}  # fmt: skip

# One idea per group; every row changes only what it names.
GROUPS = {
    "top_p and warm-up": [
        {"top_p": p, "warmup_steps": w} for p, w in ((0.3, 2), (0.5, 1), (0.5, 2), (0.5, 4), (0.7, 2), (0.85, 2), (0.85, 4))
    ],
    "dropped instead (the paper's way)": [
        {"compensation": "off", "top_p": p, "warmup_steps": w} for p, w in ((0.7, 2), (0.9, 2), (0.9, 4))
    ],
    "dense blocks": [{"dense_blocks": b} for b in ("", "0")],
    "least share of key clusters": [{"min_k_ratio": r, "top_p": 0.3} for r in (0.0, 0.03, 0.1)],
    "key clusters (N = 3,120)": [{"k_clusters": k} for k in (48, 97, 195)],
    "query clusters": [{"q_clusters": q} for q in (30, 61, 122)],
    "k-means iterations": [{"kmeans_init_iters": i, "kmeans_iters": j} for i, j in ((2, 1), (10, 2), (50, 2))],
}


def main() -> None:
    start()
    import demo_video
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention
    from svg2_pack.svg2_core.metrics import psnr, rel_l2

    model = demo_video.model()
    cases = [demo_video.conditioning(), demo_video.conditioning("carphone", with_image=False)]
    dense = [demo_video.sample(model, case=case) for case in cases]
    sections = []
    for title, variants in GROUPS.items():
        rows = []
        for variant in variants:
            settings = {**BASE, **variant}
            results = []
            for case, reference in zip(cases, dense, strict=True):
                patched, stats = SVG2SparseAttention.execute(model, min_tokens=0, **settings).result
                sample = demo_video.sample(patched, case=case)
                report = stats.latest()
                stand_ins = settings.get("k_clusters", 97) / report.tokens * (settings["compensation"] != "off")
                cost = 1 - report.sparse_share * (1 - report.density - stand_ins)
                results.append((report.density, report.sparse_share, cost, rel_l2(sample, reference),
                                psnr(demo_video.frames(sample), demo_video.frames(reference))))  # fmt: skip
            d, share, cost, error, _ = (sum(column) / len(results) for column in zip(*results, strict=True))
            db = " / ".join(f"{r[-1]:.1f}" for r in results)
            named = ", ".join(f"{k}={v!r}" for k, v in variant.items())
            rows.append([named, f"{d:.1%}", f"{share:.0%}", f"{cost:.2f}", f"{error:.3f}", db])
            print(title, rows[-1], file=sys.stderr, flush=True)
        header = ["settings", "density", "sparse calls", "cost", "rel. L2 of the latent", "PSNR, dB (image / text)"]
        sections.append(f"## {title}\n\n{markdown(header, rows)}\n")
    base = ", ".join(f"{k}={v!r}" for k, v in BASE.items())
    intro = f"# Preset sweep\n\nMade by `sweep_presets.py`; what is measured stands there. Unless a row says otherwise: {base}.\n"
    Path(__file__).with_name("presets.md").write_text("\n".join([intro, *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()
