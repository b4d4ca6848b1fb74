"""The benchmark program: its counts, its refusal to time what is wrong, and that it runs from end to end."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_floors_of_wan_720p():
    """By hand: 4 N^2 D H; two rounds of 2 N (300 + 1000) D H; 4 x 10% of that dense work, and half a low tile per cluster."""
    import floors
    from shapes import MAIN

    n, d, h = 75_600, 128, 40
    assert floors.dense(MAIN).flops == 4 * n * n * d * h
    stages = floors.stages(MAIN, 0.1)
    assert stages["k-means"].flops == 2 * 2 * n * 1300 * d * h
    assert stages["attention"].flops == pytest.approx(0.1 * 4 * (n + 300 * 32) * n * d * h)
    assert floors.dense(MAIN).seconds(788e12, 4.3e12) == pytest.approx(0.1485, rel=1e-3)


def test_row_padding_against_counted_tiles():
    """The average is half a low tile per cluster; counted over clusters of random sizes."""
    import floors
    from shapes import MAIN

    sizes = torch.multinomial(torch.rand(300, generator=torch.Generator().manual_seed(0)) + 0.1, MAIN.video, replacement=True,
                              generator=torch.Generator().manual_seed(1)).bincount()  # fmt: skip
    rest = sizes % floors.HIGH
    rows = sizes - rest + torch.where(rest == 0, 0, torch.where(rest <= floors.LOW, floors.LOW, floors.HIGH))
    assert rows.sum().item() == pytest.approx(floors.padded_rows(MAIN), rel=0.01)


@pytest.fixture
def call():
    """A small call with everything in it: (q, k, v, shape, sampled rows, groups, map, result, top_p)."""
    from dataclasses import replace

    from shapes import TINY
    from svg2_pack.svg2_core import Layout
    from svg2_pack.svg2_core.ops.dynamic_attention import dynamic_attention
    from svg2_pack.svg2_core.ops.kmeans import kmeans
    from svg2_pack.svg2_core.ops.select import select_by_mass
    from verify import sample_rows

    shape = replace(TINY, grid=(3, 6, 8))
    g = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(1, 2, shape.tokens, 128, generator=g) for _ in range(3))
    groups = [kmeans(x[:, :, shape.text :], c, iterations=20) for x, c in ((q, 6), (k, 20))]
    selected = select_by_mass(*groups, top_p=0.5, min_k_ratio=0.0, scale=128**-0.5)
    out = dynamic_attention(q, k, v, *groups, selected, layout=Layout(shape.text, shape.video), scale=128**-0.5)
    return q, k, v, shape, sample_rows(shape, "cpu"), groups, selected, out


def test_a_right_result_is_verified(call):
    import verify

    q, k, v, shape, rows, groups, selected, out = call
    truth = verify.sparse_rows(q, k, v, shape, rows, *groups, selected, False)
    assert verify.check_attention("attention", out, truth, rows, 1e-5) < 1e-5
    verify.check_map("map", *groups, selected, 0.5)
    verify.check_clusters("k-means", q[:, :, shape.text :], groups[0], tolerance=0.05)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())[:, :, rows]
    assert verify.rel_l2(verify.dense_rows(q, k, v, rows), exact.float()) < 1e-5


def test_nothing_wrong_is_timed(call):
    import verify

    q, k, v, shape, rows, groups, selected, out = call
    truth = verify.sparse_rows(q, k, v, shape, rows, *groups, selected, False)
    unwritten = out.clone()
    unwritten[0, 1, -1] = torch.nan
    other = selected.clone()
    other[0, 0, 0] = ~other[0, 0, 0]
    moved = groups[0]._replace(order=groups[0].order.roll(40, -1))
    for what in (
        lambda: verify.check_attention("unwritten", unwritten, truth, rows, 1.0),
        lambda: verify.check_attention("scaled", 1.02 * out, truth, rows, 1e-2),
        lambda: verify.check_attention("map", out, verify.sparse_rows(q, k, v, shape, rows, *groups, other, False), rows, 1e-2),
        lambda: verify.check_map("too much", *groups, torch.ones_like(selected), 0.5),
        lambda: verify.check_map("too little", *groups, torch.zeros_like(selected), 0.5),
        lambda: verify.check_clusters("moved", q[:, :, shape.text :], moved, tolerance=0.05),
    ):
        with pytest.raises(verify.WrongResult):
            what()


def test_it_runs_from_end_to_end(tmp_path):
    """On a CPU the times mean nothing; every stage has its row, and what it lacks is said."""
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--tiny", "--csv", str(tmp_path / "speed.csv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    stages = {row["stage"] for row in rows}
    assert {"k-means warm", "k-means cold", "block map", "compensation", "attention", "whole call"} <= stages
    whole = {row["compensation"]: row for row in rows if row["stage"] == "whole call"}
    assert 0 < float(whole["centroid"]["rel_l2"]) < float(whole["off"]["rel_l2"])
    assert "flash-attn 3" in done.stdout and "not installed" in done.stdout


def test_it_runs_on_a_cpu(tmp_path):
    """The shortest size: each contender verified and timed, the stages of one, and the table made of it."""
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--device", "cpu", "--tokens", "3120", "--csv", str(tmp_path / "speed.csv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    import plot_cpu

    rows = plot_cpu.newest(tmp_path / "speed.csv")
    assert all(row["processor"] and int(row["threads"]) >= 1 and row["torch"] == torch.__version__ and float(row["p50_ms"]) > 0 for row in rows)
    calls = {row["method"]: row for row in rows if row["stage"] in ("dense", "whole call")}
    errors = {name: float(calls[name]["rel_l2"]) for name in calls}
    assert errors["torch"] < 1e-5 < errors["density 0.2"] < errors["quality"] < errors["balanced"] < errors["turbo"] < 0.2
    for way in ("paper", "strips"):
        for preset in ("balanced", "turbo"):
            other = calls[f"{way} at {preset}'s error"]
            assert float(other["rel_l2"]) <= errors[preset] and float(other["density"]) > 3 * float(calls[preset]["density"])
    whole = float(calls["balanced"]["p50_ms"])
    stages = [float(row["p50_ms"]) for row in rows if row["stage"] == "stage of balanced"]
    assert len(stages) == 6 and 0.2 * whole < sum(stages) < 5 * whole, "one beside the other they are the call, on a machine that does other things too"
    line = plot_cpu.table(rows).splitlines()[2]
    assert line.startswith("| 3,120 |") and f"({errors['turbo']:.3f})" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing only where it is missing")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "run.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "needs an NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr
