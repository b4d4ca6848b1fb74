"""Draw the newest records of results/speed.csv, and renew the table of web/docs/measurements.md from them: python tests/benchmarks/plot.py

Three pictures under web/docs/img/, where the documents find them: error against time, time against tokens, share of each stage.
"""

from common import PICTURES, RESULTS, ROOT, markdown, read_rows, write_table
from shapes import MAIN
from stages import STAGES


def newest(path) -> list[dict]:
    """The rows of the last commit and GPU in the file."""
    rows = read_rows(path)
    last = rows[-1]["commit"], rows[-1]["gpu"]
    return [row for row in rows if (row["commit"], row["gpu"]) == last]


def number(row: dict, name: str) -> float:
    return float(row[name]) if row[name] else float("nan")


def picture(name: str, title: str, x: str, y: str):
    """A figure that saves itself: `with picture(...) as axes`."""
    from contextlib import contextmanager

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    @contextmanager
    def made():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        yield axes
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
        figure.savefig(PICTURES / f"{name}.png", dpi=120)
        plt.close(figure)

    return made()


def error_against_time(rows: list[dict], where: str) -> None:
    with picture("error_against_time", f"{MAIN.name}, {where}", "ms per call", "relative L2 error") as axes:
        calls = [r for r in rows if r["shape"] == MAIN.name and r["stage"] in ("whole call", "dense")]
        for key in sorted({(r["stage"], r["method"], r["compensation"]) for r in calls}):
            points = sorted((number(r, "p50_ms"), number(r, "rel_l2")) for r in calls if (r["stage"], r["method"], r["compensation"]) == key)
            axes.plot(*zip(*points, strict=True), "o-" if key[0] == "whole call" else "s", label=" ".join(filter(None, key)))
        axes.set_yscale("log")


def time_against_tokens(rows: list[dict], where: str) -> None:
    with picture("time_against_tokens", f"40 heads, {where}", "tokens", "ms per call") as axes:
        growth = [r for r in rows if r["shape"].startswith("growth") and (r["stage"] in ("dense", "whole call"))]
        for key in sorted({(r["stage"], r["method"]) for r in growth}):
            points = sorted((number(r, "tokens"), number(r, "p50_ms")) for r in growth if (r["stage"], r["method"]) == key)
            axes.plot(*zip(*points, strict=True), "o-", label=" ".join(key))
        axes.set(xscale="log", yscale="log")


def share_of_stages(rows: list[dict], where: str) -> None:
    """Of the backend whose stages were all timed."""
    main = [r for r in rows if r["shape"] == MAIN.name and r["stage"] in STAGES]
    method = next(r["method"] for r in main if r["stage"] == "far_field")
    main = [r for r in main if r["method"] == method]
    densities = sorted({round(number(r, "density"), 2) for r in main if r["density"]})
    with picture("share_of_stages", f"{MAIN.name}, {method}, {where}", "density", "ms per call") as axes:
        bottom = [0.0] * len(densities)
        for stage in STAGES:
            heights = [next((number(r, "p50_ms") for r in main if r["stage"] == stage and (not r["density"] or round(number(r, "density"), 2) == d)), 0.0)
                       for d in densities]  # fmt: skip
            axes.bar([str(d) for d in densities], heights, bottom=bottom, label=stage)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]


def table(rows: list[dict], where: str) -> str:
    lines = []
    for shape in dict.fromkeys(r["shape"] for r in rows if not r["shape"].startswith(("growth", "q-clusters"))):
        mine = [r for r in rows if r["shape"] == shape]
        dense = min((r for r in mine if r["stage"] == "dense" and r["method"].startswith(("torch", "flash"))), key=lambda r: number(r, "p50_ms"))
        for r in mine:
            if r["stage"] == "whole call":
                lines.append([shape, f"{int(r['tokens']):,}", f"{number(r, 'density'):.0%}" if r["density"] else "-", r["compensation"], r["method"], f"{number(r, 'p50_ms'):.1f}",
                              f"{number(dense, 'p50_ms'):.1f} ({dense['method']})", f"{number(dense, 'p50_ms') / number(r, 'p50_ms'):.1f}x", f"{number(r, 'rel_l2'):.3f}"])  # fmt: skip
    header = ["call", "tokens", "density", "skipped pairs", "backend", "ms", "fastest dense, ms", "speed-up", "relative error"]
    return f"{where}\n\n{markdown(header, lines)}"


def main() -> None:
    path = RESULTS / "speed.csv"
    if not path.exists():
        raise SystemExit("No records yet: run tests/benchmarks/run.py on a machine with an NVIDIA GPU.")
    rows = newest(path)
    first = rows[0]
    where = f"{first['gpu']}, driver {first['driver']}, torch {first['torch']}, Triton {first['triton']}, commit {first['commit']}, {first['date']}"
    error_against_time(rows, where)
    time_against_tokens(rows, where)
    share_of_stages(rows, where)
    write_table(ROOT / "web/docs/measurements.md", "speed", table(rows, where))


if __name__ == "__main__":
    main()
