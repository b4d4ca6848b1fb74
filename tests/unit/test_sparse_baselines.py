"""The benchmark's sparse baselines: called as their packages define it, at the error that was asked for, or not timed."""

import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("target", [0.05, 0.2, 0.5])
def test_tau_for_an_error(target):
    from sparse_baselines import tau_for

    def error_at(tau):
        return 1 / (1 + math.exp(-tau))

    assert 0.96 * target <= error_at(tau_for(error_at, target)) <= target


def test_no_tau_reaches_an_error():
    from sparse_baselines import LOWEST, tau_for

    assert tau_for(lambda tau: 1.0, 0.1) == LOWEST


def sol_attn(q, k, v, tau=1.0, sink_blocks=None, sink_q=None):
    """By its definition, `[B, T, H, D]`: blocks of 64; tau sigmas above the mean of its row, or sunk, or near: exact; else pooled."""
    out = torch.empty_like(q)
    blocks = torch.arange(q.shape[1]) // 64
    count = int(blocks[-1]) + 1
    for head in range(q.shape[2]):
        x, keys, values = (t[0, :, head].double() for t in (q, k, v))
        mean = torch.stack([keys[blocks == b].mean(0) for b in range(count)])
        total = torch.stack([values[blocks == b].mean(0) for b in range(count)])
        sizes = torch.bincount(blocks).double()
        for b in range(count):
            rows = blocks == b
            proxy = x[rows].mean(0) @ mean.T
            exact = proxy > proxy.mean() + tau * proxy.std()
            exact[max(0, b - 1) : b + 2] = True
            if sink_blocks:
                exact[slice(*sink_blocks)] = True
            if sink_q and sink_q[0] <= b < sink_q[1]:
                exact[:] = True
            scores = torch.cat([(x[rows] @ keys.T).masked_fill(~exact[blocks], -torch.inf) * q.shape[-1] ** -0.5,
                                ((x[rows] @ mean.T) * q.shape[-1] ** -0.5 + sizes.log()).masked_fill(exact, -torch.inf)], 1)  # fmt: skip
            out[0, rows, head] = (scores.softmax(-1) @ torch.cat([values, total])).to(out.dtype)
    return out


class Wrapper:
    """flashinfer's interface: blocks of these sizes along both axes, masked."""

    def __init__(self, workspace):
        assert workspace.dtype == torch.uint8

    def plan(self, mask, rows, columns, q_heads, kv_heads, width, *, sm_scale, q_data_type, kv_data_type):
        assert mask.dtype == torch.bool and rows.dtype == columns.dtype == torch.int32 and q_heads == kv_heads == len(mask)
        self.scale = sm_scale
        self.mask = torch.stack([m.repeat_interleave(r, 0).repeat_interleave(c, 1) for m, r, c in zip(mask, rows, columns, strict=True)])

    def run(self, q, k, v):
        assert q.shape[0] == len(self.mask) and q.is_contiguous()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=self.scale)


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(sol_attn=sol_attn))
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(VariableBlockSparseAttentionWrapper=Wrapper))


@pytest.fixture
def bench():
    """Benches of a small call, ready for `stages` and `whole`."""
    from dataclasses import replace

    import run
    from shapes import TINY

    def make(**shape):
        made = run.Bench(replace(TINY, **shape), torch.device("cpu"), {}, 0.01)
        made.start("torch")
        return made

    return make


def rows_of(bench, method):
    return [row for row in bench.rows if row["method"] == method]


def test_flashinfer_on_our_clusters(packages, bench):
    made = bench(text=0)
    made.stages("quality", "torch", ("near_field",))
    [theirs] = rows_of(made, "flashinfer")
    [ours] = rows_of(made, "torch")
    assert max(theirs["rel_l2"], ours["rel_l2"]) < 1e-4 and theirs["density"] == pytest.approx(ours["density"], rel=1e-2)
    made.stages("quality", "torch", ("near_field",))
    assert len(rows_of(made, "flashinfer")) == 1


def test_a_wrong_flashinfer_is_not_timed(packages, bench, monkeypatch, capsys):
    monkeypatch.setattr(Wrapper, "run", lambda self, q, k, v: 1.1 * torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask))
    made = bench(text=0)
    made.stages("quality", "torch", ("near_field",))
    assert rows_of(made, "flashinfer") == [] and "flashinfer             not timed: flashinfer: relative error" in capsys.readouterr().out


@pytest.mark.parametrize("text", [0, 7])
def test_sol_attn_at_our_error(packages, bench, text):
    made = bench(text=text)
    made.whole("quality", "torch")
    [ours] = [row for row in rows_of(made, "torch") if row["stage"] == "whole call"]
    [theirs] = rows_of(made, "sol_attn")
    assert theirs["stage"] == "whole call" and 0 < theirs["rel_l2"] <= ours["rel_l2"]


def test_what_is_not_installed_is_said(bench, monkeypatch, capsys):
    for name in ("comfy_kitchen", "flashinfer"):
        monkeypatch.setitem(sys.modules, name, None)
    made = bench(text=0)
    made.stages("quality", "torch", ("near_field",))
    made.whole("quality", "torch")
    said = capsys.readouterr().out
    assert "flashinfer             not timed: import of flashinfer" in said and "sol_attn               not timed: import of comfy_kitchen" in said


def test_the_target_against_sol_attn():
    import targets
    from shapes import MAIN

    def row(stage, method, ms, error, compensation, density=""):
        return {"shape": MAIN.name, "stage": stage, "method": method, "p50_ms": ms, "rel_l2": error, "compensation": compensation,
                "density": density, "extra_mib": 1.0, "tokens": MAIN.tokens, "q_clusters": 300}  # fmt: skip

    rows = [row("dense", "torch flash", 150.0, 1e-3, "", 1.0), row("whole call", "triton", 40.0, 0.1, "first_order", 0.1),
            row("whole call", "sol_attn", 50.0, 0.098, "pooled"), row("whole call", "sol_attn", 20.0, 0.2, "pooled")]  # fmt: skip
    found = {what: (measured, verdict) for what, _, measured, verdict in targets.lines(rows, {"first_use_s": 1.0})}
    assert found["sol_attn at error 0.100, triton"] == ("1.25x", "met") and not any(what.startswith("k-means, sol") for what in found)
    assert not any("sol_attn" in what and what.startswith("extra") for what in found)


def test_the_report_names_every_stage():
    """Floor, expected and measured, by this machine's ceilings; a missed target is called missed."""
    import targets
    from shapes import MAIN
    from stages import BY_DENSITY, STAGES

    of = {"gpu": "NVIDIA H100 80GB HBM3", "shape": MAIN.name, "compensation": "", "rel_l2": 0.1, "extra_mib": 1000.0, "tokens": MAIN.tokens, "q_clusters": 300}
    rows = [{**of, "stage": "dense", "method": "torch cudnn", "density": 1.0, "p50_ms": 200.0}]
    rows += [{**of, "stage": stage, "method": "cuda_fa3", "density": 0.05 if stage in BY_DENSITY else "", "p50_ms": 3.0}
             for stage in (*STAGES, "kmeans_in cold")]  # fmt: skip
    rows.append({**of, "stage": "whole call", "method": "cuda_fa3", "density": 0.05, "p50_ms": 50.0})
    text = targets.report(rows, {"first_use_s": 1.0, "flops": 750e12, "bandwidth": 3e12}).splitlines()
    for stage in ("dense", "whole call", *STAGES):
        [line] = [line for line in text if line.startswith(f"  {stage:16} ") and "dense  " not in line[19:]]
        least, expected, measured = map(float, line.split()[-3:])
        assert 0 < least <= expected and measured in (3.0, 50.0, 200.0)
    assert any("whole call at 0.05, cuda_fa3" in line and "4.00x" in line and "MISSED" in line for line in text)
    assert any("extra memory, cuda_fa3" in line and "262 MiB" in line and line.endswith("met") for line in text)


def test_the_records_are_drawn(packages, bench, monkeypatch, tmp_path):
    import common
    import plot
    import run
    from shapes import TINY
    from stages import STAGES

    made = bench()
    made.dense()
    made.stages("quality", "torch", STAGES)
    made.whole("quality", "torch")
    where = {"gpu": "none", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "date": "today"}
    common.append_rows(tmp_path / "speed.csv", [{**where, **row} for row in made.rows], run.FIELDS)
    page = tmp_path / "web/docs/measurements.md"
    page.parent.mkdir(parents=True)
    page.write_text("# x\n<!-- speed -->\n<!-- /speed -->\n")
    for name, value in (("RESULTS", tmp_path), ("PICTURES", tmp_path), ("ROOT", tmp_path), ("MAIN", TINY)):
        monkeypatch.setattr(plot, name, value)
    plot.main()
    assert {path.stem for path in tmp_path.glob("*.png")} == {"error_against_time", "time_against_tokens", "share_of_stages"}
    table = page.read_text()
    with open(tmp_path / "speed.csv", newline="") as file:
        calls = [row for row in csv.DictReader(file) if row["stage"] == "whole call"]
    assert len(calls) == 2 and table.count("\n| tiny |") == 2 and "nan" not in table
    assert all(f"{float(row['rel_l2']):.3f}" in table for row in calls)
