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


def test_counts_of_wan_720p():
    """By hand: 4 N^2 D H; a tenth of it and its padding; each tile's keys and values, and stand-ins of two vectors each."""
    import floors
    from shapes import MAIN

    n, d, h = 75_600, 128, 40
    gpu = floors.GPUS["H200"]
    assert floors.dense(MAIN).tensor == 4 * n * n * d * h
    assert floors.dense_seconds(MAIN, gpu)[0] == pytest.approx(0.1485, rel=1e-3)
    kernels = {(stage, k.name): k for stage, all_of_it in floors.stages(MAIN, 0.1, gpu).items() for k in all_of_it}
    near, far = kernels["near_field", "near"], kernels["far_field", "far"]
    assert near.tensor == pytest.approx(4 * (n + 300 * 32) * (0.1 * (n + 1000 * 7.5) + 32) * d * h)
    tiles = (n / 128 + 150) * h
    assert near.memory + near.l2 == pytest.approx(tiles * 0.1 * n * 512 + 4 * n * d * h)  # and queries and results; all in L2
    assert far.l2 >= tiles * 2 * 1000 * d * 2 and far.tensor >= 2 * (n + 300 * 32) * 1000 * (17 / 16 + 1) * d * h
    assert kernels["kmeans_in", "means"].memory == pytest.approx(n * h * (2 * d + 4))
    assert kernels["exact_rows", "part"].memory == 2 * 2 * n * d * h


def test_what_limits_is_told():
    """A head's program alone waits; a GPU without room for a head in L2 reads from memory."""
    import floors
    from shapes import MAIN

    assert floors.stages(MAIN, 0.05, floors.GPUS["H100"])["logit_spaces"][-1].expected(floors.GPUS["H100"])[1] == "waits"
    small = floors.stages(MAIN, 0.05, floors.GPUS["RTX 3090"])["near_field"][-1]
    large = floors.stages(MAIN, 0.05, floors.GPUS["RTX 4090"])["near_field"][-1]
    assert small.memory > 10 * large.memory and small.memory + small.l2 == pytest.approx(large.memory + large.l2)
    for gpu in floors.GPUS.values():
        for near in gpu.near:
            calls = [floors.whole(MAIN, density, gpu, near) for density in (0.02, 0.05, 0.1)]
            assert all(floor <= expected for floor, expected in calls) and calls[0] < calls[1] < calls[2]


@pytest.mark.parametrize("iterations", [1, 2])
def test_every_launch_is_counted(monkeypatch, iterations):
    pytest.importorskip("triton", reason="Triton has no build for this system")
    import floors
    import launches
    from shapes import MAIN

    with launches.record(monkeypatch) as recording:
        launches.sparse_call(recording, kmeans_iters=iterations)
    assert floors.launches(floors.stages(MAIN, 0.05, floors.GPUS["H100"], iterations)) == len(recording.launches)


def test_the_presets_densities():
    import run
    from svg2_pack.svg2_core.presets import preset_config

    assert {name: preset_config(name, "wan_t2v").density for name in run.PRESETS} == run.PRESETS


@pytest.mark.parametrize("gpu", ["H100", "RTX 3090"])
def test_the_model_is_printed(gpu):
    done = subprocess.run([sys.executable, str(BENCHMARKS / "run.py"), "--model", "--gpu", gpu], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"wan-14b-720p on one {gpu}" in done.stdout and "whole call, triton" in done.stdout and ("cuda_fa3" in done.stdout) == (gpu == "H100")


def test_row_padding_against_counted_tiles():
    """The average is half a low tile per cluster; counted over clusters of random sizes."""
    import floors
    from shapes import MAIN

    sizes = torch.multinomial(torch.rand(300, generator=torch.Generator().manual_seed(0)) + 0.1, MAIN.video, replacement=True,
                              generator=torch.Generator().manual_seed(1)).bincount()  # fmt: skip
    rest = sizes % floors.HIGH
    rows = sizes - rest + torch.where(rest == 0, 0, torch.where(rest <= floors.LOW, floors.LOW, floors.HIGH))
    assert rows.sum().item() == pytest.approx(floors.padded_rows(MAIN), rel=0.01)


@pytest.fixture(scope="module")
def call():
    """A small call, stage by stage: (part, sampled rows)."""
    from dataclasses import replace

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.syspath_prepend(str(BENCHMARKS))
        import run
        from shapes import TINY
        from stages import STAGES

        bench = run.Bench(replace(TINY, grid=(3, 6, 8)), torch.device("cpu"), {}, 0.01)
        bench.start("torch")
        part = bench.parts(bench.config("quality"), "torch")[0][0]
        for stage in STAGES:
            part.run(stage)
            part.check(stage, bench.sampled)
    return part, bench.sampled


def test_a_right_result_is_verified(call):
    """The stages were, as they were made; so is dense attention."""
    import verify

    part, rows = call
    for stage, most in (("kmeans_in", 1e-5), ("moments", 1e-4), ("exact_rows", 1e-5), ("far_field", 1e-5), ("report", 1e-5)):
        assert part.check(stage, rows) < most, stage
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (part.q, part.k, part.v)))[:, :, rows]
    assert verify.rel_l2(verify.dense_rows(part.q, part.k, part.v, rows), exact.float()) < 1e-5
    assert 0 < part.density < 0.2


def wrong(part, stage):
    """What a stage might have found, and did not."""
    known, selected, groups = part.known, part.selected.clone(), part.groups
    unwritten, lse = part.out.clone(), part.logsumexp.clone()
    unwritten[0, 1, -1] = torch.nan
    lse[0, 0] += 0.1
    selected[0, 0, 0] = ~selected[0, 0, 0]
    more = torch.ones_like(selected)
    space = part.spaces[0]
    return {
        "logit_spaces": [{"spaces": (space._replace(projection=1.1 * space.projection), part.spaces[1])}],
        "kmeans_in": [
            {"groups": [groups[0]._replace(order=groups[0].order.roll(40, -1)), groups[1]]},
            {"groups": [groups[0], groups[1]._replace(centroids=groups[1].centroids + 1)]},
        ],
        "moments": [{"known": known._replace(**{field: 1.3 * getattr(known, field)})}
                    for field in ("values", "log_mass", "variance", "spread", "direction_variances")],
        "select_by_error": [{"selected": x} for x in (selected, more, ~more, part.selected.roll(1, 3))],
        "near_field": [{"logsumexp": lse}, {"selected": selected}],
        "exact_rows": [{"exact": part.exact._replace(out=1.02 * part.exact.out)}, {"exact": part.exact._replace(rows=part.exact.rows - 1)}],
        "far_field": [{"out": unwritten}, {"out": 1.03 * part.out}, {"shares": part.shares + 1}, {"known": known._replace(log_mass=known.log_mass + 0.5)}],
        "report": [{"told": part.told._replace(density=part.told.density * 1.1)}, {"told": part.told._replace(error=part.told.error * 1.1)}],
    }[stage]  # fmt: skip


@pytest.mark.parametrize("stage", ["logit_spaces", "kmeans_in", "moments", "select_by_error", "near_field", "exact_rows", "far_field", "report"])
def test_nothing_wrong_is_timed(call, stage):
    import copy

    import verify

    part, rows = call
    part = copy.copy(part)
    if stage == "near_field":  # before the far field was added
        part.out = part.out.clone()
        part.near_field()
        part.check(stage, rows)
    for changes in wrong(part, stage):
        changed = copy.copy(part)
        vars(changed).update(changes)
        with pytest.raises(verify.WrongResult):
            changed.check(stage, rows)


def test_it_runs_from_end_to_end(tmp_path):
    """On a CPU the times mean nothing; every stage has its row, and what it lacks is said."""
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--tiny", "--csv", str(tmp_path / "speed.csv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    from stages import BY_DENSITY, STAGES

    stages = {row["stage"]: row for row in rows if row["method"] == "torch"}
    assert set(stages) == {*STAGES, "kmeans_in cold", "whole call"}
    assert all(bool(stages[name]["density"]) == (name in BY_DENSITY) for name in STAGES)
    assert all(0 <= float(stages[name]["rel_l2"]) < 1e-2 for name in STAGES if name != "select_by_error")
    assert stages["whole call"]["compensation"] == "first_order" and 0 < float(stages["whole call"]["rel_l2"]) < 0.3
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
