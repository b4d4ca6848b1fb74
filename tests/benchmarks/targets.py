"""The targets for Wan 14B 720p beside what was measured: ratios within one run, tile padding included."""

import floors
from shapes import HEAD_DIM, MAIN

WHOLE = {0.02: 7.0, 0.05: 5.0, 0.1: 3.3}  # least speed-up of the whole call, by density
LEAST_EFFICIENCY = 0.5  # of density x the fastest dense attention, of the near field
MOST_SHARE = {"logit_spaces": 0.01, "kmeans_in": 0.04, "moments": 0.03, "select_by_error": 0.01, "exact_rows": 0.005, "far_field": 0.04, "report": 0.001}
MOST_EXTRA_MIB = 512  # beside the result


def _median(rows, **wanted) -> float | None:
    """Milliseconds of the first row that has these values; density is met within 15%."""
    density = wanted.pop("density", None)
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()) and (
            density is None or abs(float(row["density"]) - density) < 0.15 * density
        ):
            return float(row["p50_ms"])
    return None


def lines(rows: list[dict], limits: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """(what, target, measured, verdict) of every target that these rows speak of."""
    main = [row for row in rows if row["shape"] == MAIN.name]
    exact = [float(r["p50_ms"]) for r in main if r["stage"] == "dense" and "INT8" not in r["method"] and "Sage" not in r["method"]]
    if not exact:
        return []
    dense, table = min(exact), []

    def judge(what, target, value, ok, text):
        if value is not None:
            table.append((what, target, text, "met" if ok else "MISSED"))

    for method in sorted({r["method"] for r in main if r["stage"] == "whole call"} - {"sol_attn"}):
        for stage, most in MOST_SHARE.items():
            part = _median(main, stage=stage, method=method)
            judge(f"{stage}, {method}", f"at most {most:.1%} of dense", part, part and part <= most * dense, f"{100 * (part or 0) / dense:.2f}%")
        kmeans, theirs, cold = (_median(main, stage=stage, method=m) for stage, m in
                                (("kmeans_in", method), ("kmeans_in", "flash-kmeans"), ("kmeans_in cold", method)))  # fmt: skip
        if kmeans and theirs:
            judge(f"kmeans_in, {method}", "no slower than flash-kmeans", kmeans, kmeans <= theirs, f"{theirs / kmeans:.2f}x")
        if kmeans and cold:
            judge(f"cold start, {method}", "8 iterations, at most 8 times one", cold, cold <= 8 * kmeans, f"{cold / kmeans:.1f}")
        for density, speedup in WHOLE.items():
            near = _median(main, stage="near_field", method=method, density=density)
            share = density * dense / near if near else 0
            judge(f"near field at {density}, {method}", f"at least {LEAST_EFFICIENCY} of density x dense", near, share >= LEAST_EFFICIENCY, f"{share:.2f}")
            whole = _median(main, stage="whole call", method=method, density=density)
            judge(f"whole call at {density}, {method}", f"at least {speedup}x dense", whole, whole and dense / whole >= speedup, f"{dense / (whole or 1):.2f}x")
        result = MAIN.tokens * MAIN.heads * HEAD_DIM * 2 / 2**20
        extra = [float(r["extra_mib"]) - result for r in main if r["stage"] == "whole call" and r["method"] == method and r["extra_mib"] is not None]
        judge(f"extra memory, {method}", f"at most {MOST_EXTRA_MIB} MiB", extra or None, extra and max(extra) <= MOST_EXTRA_MIB, f"{max(extra, default=0):.0f} MiB")
        table += _against_sol(main, method) + _growth(rows, method) + _small_clusters(rows, method)
    judge("first use", "at most 10 s", limits["first_use_s"], limits["first_use_s"] <= 10, f"{limits['first_use_s']:.1f} s")
    return table


def _against_sol(main, method) -> list[tuple]:
    """ComfyUI's own sparse attention at the error of each whole call, or a little less; without one of such an error, no row."""
    table, theirs = [], [row for row in main if row["method"] == "sol_attn"]
    for ours in (r for r in main if r["stage"] == "whole call" and r["method"] == method):
        error = float(ours["rel_l2"])
        equal = [float(r["p50_ms"]) for r in theirs if 0.9 * error <= float(r["rel_l2"]) <= error]
        if equal:
            gain = min(equal) / float(ours["p50_ms"])
            what = f"sol_attn at error {error:.3f}, {method}"
            table.append((what, "slower than the whole call", f"{gain:.2f}x", "met" if gain > 1 else "MISSED"))
    return table


def _growth(rows, method) -> list[tuple]:
    times = [float(r["p50_ms"]) / int(r["tokens"]) ** 2 for r in rows
             if r["shape"].startswith("growth") and int(r["tokens"]) >= 32_000 and r["method"] == method
             and r["stage"] == "whole call"]  # fmt: skip
    if len(times) < 2:
        return []
    spread = max(times) / min(times) - 1
    return [(f"time per token pair, 32k to 120k, {method}", "constant within 10%", f"{spread:.0%}", "met" if spread <= 0.1 else "MISSED")]


def _small_clusters(rows, method) -> list[tuple]:
    times = {r["q_clusters"]: float(r["p50_ms"]) for r in rows
             if r["shape"].startswith("q-clusters") and r["method"] == method and r["stage"] == "near_field"}  # fmt: skip
    if not {100, 400} <= set(times):
        return []
    ratio = times[400] / times[100]
    return [(f"400 against 100 query clusters, {method}", "at most 1.3x slower", f"{ratio:.2f}x", "met" if ratio <= 1.3 else "MISSED")]


def report(rows: list[dict], limits: dict[str, float]) -> str:
    """Targets, and each stage of the main shape as possible, expected and measured."""
    found = lines(rows, limits)
    text = ["", "targets, Wan 14B 720p:", *(f"  {what:44} {target:36} {value:>10}  {verdict}" for what, target, value, verdict in found)]
    main = [row for row in rows if row["shape"] == MAIN.name]
    text += ["", "milliseconds: floor with this machine's ceilings, expected, measured"]
    gpu = floors.like(main[0]["gpu"], limits["flops"], limits["bandwidth"])
    for row in main:
        stage, method, density = row["stage"], row["method"], float(row.get("density") or 0.05)
        found = floors.stages(MAIN, density, gpu)
        near = method if method in gpu.near else "triton"
        if stage == "dense":
            pair = floors.dense_seconds(MAIN, gpu)
        elif stage == "whole call" and method != "sol_attn":
            pair = floors.whole(MAIN, density, gpu, near)
        elif stage in found and method != "flash-kmeans":
            pair = floors.stage_seconds(stage, found[stage], gpu, near)[:2]
        else:
            continue
        least, expected = (1000 * seconds for seconds in pair)
        text.append(f"  {stage:16} {method:22} {row.get('density') or ''!s:6.6} {least:8.2f} {expected:8.2f} {float(row['p50_ms']):8.2f}")
    return "\n".join(text)
