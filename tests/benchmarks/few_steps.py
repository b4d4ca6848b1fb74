"""What a dense first step is worth where steps are few: whole samples of the shipped checkpoint at 4 to 8 steps. (20: presets.md.)

    python tests/benchmarks/few_steps.py      # ten minutes on one core; --table: only the page, from the results

Two clips with two seeds each, as in sweep_presets.py; PSNR against the dense sample of as many steps. "steps' worth" is the work of
attention over the whole run in dense steps, clustering not counted. Results go into results/few_steps.csv, few_steps.md is made
from them.
"""

import argparse
import statistics
from pathlib import Path

from common import RESULTS, append_rows, markdown, read_rows, start
from sweep_presets import CLIPS, SEEDS

STEPS, WARMUP = (4, 6, 8), (0, 1)
PRESETS = ("balanced", "turbo")
FILE = RESULTS / "few_steps.csv"
FIELDS = ("clip", "seed", "steps", "preset", "warmup_steps", "sparse", "density", "error", "psnr")
HEADER = ["steps", "preset", "no warm-up, dB", "one dense step, dB", "gained, dB", "work without, steps' worth", "with"]


def run(clip: str, seed: int, steps: int) -> None:
    import demo_video
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention
    from svg2_pack.svg2_core.metrics import psnr

    model, case = demo_video.model(), demo_video.conditioning(**CLIPS[clip])

    def video(patched):
        return demo_video.frames(demo_video.sample(patched, seed=seed, steps=steps, case=case))

    dense = video(model)
    for preset in PRESETS:
        for warmup in WARMUP:
            patched, stats = SVG2SparseAttention.execute(model, preset=preset, warmup_steps=warmup, min_tokens=0).result
            found, report = psnr(video(patched), dense), stats.latest()
            row = {"clip": clip, "seed": seed, "steps": steps, "preset": preset, "warmup_steps": warmup, "sparse": round(report.sparse_share, 4),
                   "density": round(report.density, 5), "error": round(report.error, 5), "psnr": round(found, 3)}  # fmt: skip
            append_rows(FILE, [row], FIELDS)
            print(row, flush=True)


def page() -> str:
    rows, lines = read_rows(FILE), []
    for steps in STEPS:
        for preset in PRESETS:
            mine = {w: [r for r in rows if (int(r["steps"]), r["preset"], int(r["warmup_steps"])) == (steps, preset, w)] for w in WARMUP}
            if not all(mine.values()):
                continue
            without, one = (statistics.mean(float(r["psnr"]) for r in mine[w]) for w in WARMUP)
            work = [statistics.mean(steps * (1 - float(r["sparse"]) * (1 - float(r["density"]))) for r in mine[w]) for w in WARMUP]
            lines.append([str(steps), preset, f"{without:.1f}", f"{one:.1f}", f"{one - without:+.1f}", *(f"{x:.2f}" for x in work)])
    return (
        "# Few steps\n\nMade by `few_steps.py`; how stands there. Means over two clips with two seeds each, 3,120 tokens.\n\n"
        f"{markdown(HEADER, lines)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only make few_steps.md from the results")
    if not parser.parse_args().table:
        start()
        for clip in CLIPS:
            for seed in SEEDS:
                for steps in STEPS:
                    run(clip, seed, steps)
    Path(__file__).with_name("few_steps.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
