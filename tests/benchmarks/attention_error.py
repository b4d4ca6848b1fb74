"""Error of one sparse attention call against dense, on inputs recorded from the shipped checkpoint.

    python tests/benchmarks/attention_error.py

A table for web/docs/measurements.md: at equal density, with skipped clusters dropped (the paper), represented by their centroids (both on
Euclidean clusters, pairs chosen by mass), and by the far field of first order (clusters in the metric of the logits, pairs
chosen by expected error). Clusters start cold, in the numbers of the balanced preset, on a CPU in fp32. Also written to
results/attention_error.csv.
"""

from dataclasses import replace

from common import RESULTS, ROOT, markdown, start, write_rows, write_table

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3)


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


def rows_by_density(inputs, config) -> list[dict]:
    """config: with first order; the other ways are made from it."""
    by_mass = replace(config, density=None, metric_directions=0, min_k_ratio=0.0, kmeans_init_iters=10)
    rows = []
    for target in DENSITIES:
        top_p = top_p_for_density(inputs, replace(by_mass, compensation="off"), target)
        for way, settings in {
            "dropped": replace(by_mass, top_p=top_p, compensation="off"),
            "centroids": replace(by_mass, top_p=top_p, compensation="centroid"),
            "first order": replace(config, density=target),
        }.items():
            error, density = measure(inputs, settings)
            rows.append({"target": target, "way": way, "top_p": "" if settings.density else top_p, "density": density, "rel_l2": error})
    return rows


def table(rows: list[dict]) -> str:
    lines = []
    for dropped, centroids, first in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        lines.append([f"{first['target']:.0%}", f"{dropped['density']:.1%} / {first['density']:.1%}",
                      *(f"{row['rel_l2']:.3f}" for row in (dropped, centroids, first)), f"{first['rel_l2'] / centroids['rel_l2']:.2f}"])  # fmt: skip
    return markdown(
        ["about", "density by mass / by error", "skipped pairs dropped (paper)", "centroids stand in", "first order", "last to centroids"],
        lines,
    )


def main() -> None:
    start()
    import demo_video
    from recorded_attention import record
    from svg2_pack.svg2_core.presets import preset_config

    rows = rows_by_density(record(demo_video.model()), preset_config("balanced", "wan_i2v"))
    write_rows(RESULTS / "attention_error.csv", rows)
    print(table(rows))
    write_table(ROOT / "web/docs/measurements.md", "attention_error", table(rows))


if __name__ == "__main__":
    main()
