"""Error of one sparse attention call against dense, on inputs recorded from the shipped checkpoint.

    python tests/benchmarks/attention_error.py

Two tables for the README: error and density as top_p rises, and the error at equal density with skipped clusters
dropped (the paper) or represented by their centroids. Clusters start cold with the balanced preset's iterations, on a
CPU in fp32. Also written to results/attention_error.csv.
"""

import csv
from dataclasses import replace

from common import RESULTS, ROOT, markdown, start, write_table

TOP_P = (0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
DENSITIES = (0.05, 0.1, 0.2, 0.3)


def measure(inputs, config) -> tuple[float, float]:
    """(relative L2 error, density) of a config, mean over the recorded calls."""
    from svg2_pack.svg2_core import Layout, svg2_attention
    from svg2_pack.svg2_core.metrics import rel_l2
    from torch.nn.functional import scaled_dot_product_attention

    errors, densities = [], []
    for q, k, v in inputs:
        result = svg2_attention(q, k, v, Layout(0, q.shape[2]), config)
        errors.append(rel_l2(result.out, scaled_dot_product_attention(q, k, v)))
        densities.append(result.density.item())
    return sum(errors) / len(errors), sum(densities) / len(densities)


def top_p_for_density(inputs, config, density: float) -> float:
    """The top_p whose density is within 3% of `density`, by bisection."""
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2
        got = measure(inputs[:: len(inputs) // 3], replace(config, top_p=middle))[1]
        if abs(got - density) < 0.03 * density or high - low < 1e-3:
            return middle
        low, high = (middle, high) if got < density else (low, middle)


def rows_by_top_p(inputs, config) -> list[dict]:
    rows = []
    for top_p in TOP_P:
        for compensation in ("off", "centroid"):
            error, density = measure(inputs, replace(config, top_p=top_p, compensation=compensation))
            rows.append({"table": "top_p", "top_p": top_p, "compensation": compensation, "density": density, "rel_l2": error})
    return rows


def rows_by_density(inputs, config) -> list[dict]:
    rows = []
    for target in DENSITIES:
        top_p = top_p_for_density(inputs, config, target)
        for compensation in ("off", "centroid"):
            error, density = measure(inputs, replace(config, top_p=top_p, compensation=compensation))
            rows.append({"table": "density", "top_p": top_p, "compensation": compensation, "density": density, "rel_l2": error})
    return rows


def table(rows: list[dict], first: str) -> str:
    pairs = [(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    return markdown(
        [first, "density", "error, skipped pairs dropped (paper)", "error, centroid stands in", "ratio"],
        [[f"{a['top_p']:.2f}" if first == "top_p" else f"{a['density']:.0%}", f"{a['density']:.1%}", f"{a['rel_l2']:.3f}",
          f"{b['rel_l2']:.3f}", f"{b['rel_l2'] / a['rel_l2']:.2f}"] for a, b in pairs],
    )  # fmt: skip


def main() -> None:
    start()
    import demo_video
    from recorded_attention import record
    from svg2_pack.svg2_core.presets import preset_config

    inputs = record(demo_video.model())
    config = replace(preset_config("balanced", "wan_i2v"), min_k_ratio=0.0)
    by_top_p, by_density = rows_by_top_p(inputs, config), rows_by_density(inputs, config)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "attention_error.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, by_top_p[0].keys())
        writer.writeheader()
        writer.writerows(by_top_p + by_density)
    text = table(by_top_p, "top_p") + "\n\nAt equal density:\n\n" + table(by_density, "about")
    print(text)
    write_table(ROOT / "README.md", "attention_error", text)


if __name__ == "__main__":
    main()
