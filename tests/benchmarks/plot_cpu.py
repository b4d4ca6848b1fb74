"""Draw the newest records of results/speed_cpu.csv, and renew the README's table from them: python tests/benchmarks/plot_cpu.py

Three pictures under web/docs/img/, where web/docs/measurements.md finds them: time against tokens, error against time, share of each stage.
"""

from common import RESULTS, ROOT, markdown, read_rows, write_table
from plot import number, picture

ORDER = ("quality", "balanced", "turbo")
MAIN = 32760


def newest(path) -> list[dict]:
    """The rows of the last machine in the file: of each size those of its last commit, and of a method measured twice the later."""
    rows = read_rows(path)
    machine = ("processor", "threads", "torch")
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in machine)]
    commit = {row["tokens"]: row["commit"] for row in rows}
    rows = [row for row in rows if row["commit"] == commit[row["tokens"]]]
    return list({tuple(row[name] for name in ("dtype", "tokens", "stage", "method")): row for row in rows}.values())


def where(rows: list[dict]) -> str:
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{first['processor']}, {first['threads']} threads, torch {first['torch']}, commit {commits}, {first['date']}"


def of(rows: list[dict], **key) -> list[dict]:
    return [row for row in rows if all(row[name] == str(value) for name, value in key.items())]


def time_against_tokens(rows: list[dict]) -> None:
    with picture("cpu_time_against_tokens", f"two heads of 128, fp32\n{where(rows)}", "tokens", "seconds per call") as axes:
        for stage, method, label in (("dense", "torch", "dense: torch's attention"), *(("whole call", name, f"SVG2, {name}") for name in ORDER)):
            mine = of(rows, dtype="float32", stage=stage, method=method)
            points = sorted((number(r, "tokens"), number(r, "p50_ms") / 1000) for r in mine)
            axes.plot(*zip(*points, strict=True), "o-", label=label)
        axes.set(xscale="log", yscale="log")


def error_against_time(rows: list[dict]) -> None:
    with picture("cpu_error_against_time", f"{MAIN:,} tokens, two heads of 128, fp32\n{where(rows)}", "seconds per call", "relative L2 error") as axes:
        calls = of(rows, dtype="float32", tokens=MAIN, stage="whole call")
        groups = {
            "SVG2": [r for r in calls if r["method"] in ORDER or r["method"].startswith("density")],
            "the paper's way": [r for r in calls if r["method"].startswith("paper")],
            "strips, pooled stand-ins": [r for r in calls if r["method"].startswith("strips")],
        }
        for label, mine in groups.items():
            points = sorted((number(r, "p50_ms") / 1000, number(r, "rel_l2")) for r in mine)
            axes.plot(*zip(*points, strict=True), "o-", label=label)
        [dense] = of(rows, dtype="float32", tokens=MAIN, stage="dense")
        axes.axvline(number(dense, "p50_ms") / 1000, color="grey", linestyle="--", label="dense: torch's attention")
        axes.set(yscale="log", xlim=(0, None))


def share_of_stages(rows: list[dict]) -> None:
    sizes = sorted({int(r["tokens"]) for r in rows})
    with picture("cpu_stages", f"balanced, two heads of 128, fp32\n{where(rows)}", "tokens", "% of torch's attention") as axes:
        bottom = [0.0] * len(sizes)
        stages = dict.fromkeys(r["method"] for r in rows if r["stage"] == "stage of balanced")
        for stage in stages:
            heights = []
            for size in sizes:
                [row], [dense] = of(rows, tokens=size, stage="stage of balanced", method=stage), of(rows, dtype="float32", tokens=size, stage="dense")
                heights.append(100 * number(row, "p50_ms") / number(dense, "p50_ms"))
            axes.bar([f"{size:,}" for size in sizes], heights, bottom=bottom, label=stage.replace("_", " "))
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]


def table(rows: list[dict]) -> str:
    lines = []
    for tokens in sorted({int(r["tokens"]) for r in rows}):
        [dense] = of(rows, dtype="float32", tokens=tokens, stage="dense")
        cells = [f"{tokens:,}", f"{number(dense, 'p50_ms') / 1000:.2f} s"]
        for name in ORDER:
            [row] = of(rows, dtype="float32", tokens=tokens, stage="whole call", method=name)
            cells.append(f"{number(row, 'p50_ms') / 1000:.2f} s: **{number(row, 'times_faster'):.1f}** ({number(row, 'rel_l2'):.3f})")
        for way in ("paper", "strips"):
            mine = of(rows, dtype="float32", tokens=tokens, stage="whole call", method=f"{way} at balanced's error")
            cells.append(f"{number(mine[0], 'times_faster'):.1f} ({number(mine[0], 'density'):.0%})" if mine else "-")
        lines.append(cells)
    header = ["tokens", "torch's attention", "`quality` (10%)", "`balanced` (5%)", "`turbo` (2%)", "the paper's way at `balanced`'s error", "strips at that error"]
    return f"{markdown(header, lines)}\n\n*{where(rows)}.*{_half(rows)}"


def _half(rows: list[dict]) -> str:
    """A sentence about bf16, where torch's own attention has units that these products do not all use."""
    half = {r["method"]: r for r in rows if r["dtype"] == "bfloat16"}
    if not half:
        return ""
    dense = number(half["torch"], "p50_ms")
    told = ", ".join(f"{name} {number(half[name], 'times_faster'):.1f} times ({number(half[name], 'rel_l2'):.3f})" for name in ORDER)
    return f"\n\nIn bf16, {int(half['torch']['tokens']):,} tokens: torch's attention {dense / 1000:.2f} s; {told}."


def main() -> None:
    path = RESULTS / "speed_cpu.csv"
    if not path.exists():
        raise SystemExit("No records yet: run tests/benchmarks/run.py --device cpu.")
    rows = newest(path)
    time_against_tokens(rows)
    if of(rows, tokens=MAIN, stage="dense"):
        error_against_time(rows)
    share_of_stages(rows)
    write_table(ROOT / "README.md", "speed_cpu", table(rows))


if __name__ == "__main__":
    main()
