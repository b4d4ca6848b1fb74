"""The benchmark of norms and rotary embedding: its counts, its refusal to time what is wrong, and that it runs."""

import csv
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fused

    return fused


def test_bytes_by_hand(fused):
    """Wan 14B's queries: bf16 in and out, a table of 64 matrices of four fp32 a token, and a row of weights."""
    cases = {case.name: case for case in fused.CASES}
    assert cases["wan-14b q or k"].bytes(75_600) == pytest.approx(75_600 * (2 * 5120 * 2 + 64 * 4 * 4), rel=1e-4)
    assert cases["wan-14b modulation"].bytes(75_600) == pytest.approx(2 * 75_600 * 5120 * 2, rel=1e-4)


def test_nothing_wrong_is_timed(fused):
    from verify import WrongResult

    for case in fused.CASES:
        if case.values <= 1536:
            given = fused.inputs(case, 9, torch.device("cpu"), torch.float32, 0)
            truth, torchs = fused.by_torch(case)(*(x.double() for x in given)), fused.by_torch(case)(*given)
            right = fused.by_us(case, "torch")(*given)
            assert fused.check("right", right, torchs, truth) < 1e-6
            unwritten = right.clone()
            unwritten.view(-1)[-1] = torch.nan
            for wrong in (1.001 * right, unwritten, right[:, 1:], right.roll(1, 1)):
                with pytest.raises(WrongResult):
                    fused.check("wrong", wrong, torchs, truth)


def test_it_runs_from_end_to_end(fused, tmp_path, monkeypatch, capsys):
    """On a CPU the times mean nothing; each case is verified and has its rows."""
    monkeypatch.setattr(fused, "load_pack", lambda: None)  # it is loaded
    monkeypatch.setattr(sys, "argv", ["fused.py", "--tiny", "--csv", str(tmp_path / "fused.csv")])
    fused.main()
    said = capsys.readouterr().out
    with open(tmp_path / "fused.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for case in fused.CASES:
        methods = {row["method"].split()[0] for row in rows if row["case"] == case.name}
        assert {"torch", "svg2"} <= methods
        assert case.kind == "norm" or "comfy_kitchen" in methods or "comfy_kitchen is not installed" in said
    assert "not timed" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing only where it is missing")
def test_without_a_gpu(fused, monkeypatch, capsys):
    """It says so, and what can be had all the same."""
    monkeypatch.setattr(sys, "argv", ["fused.py"])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        fused.main()
    monkeypatch.setattr(sys, "argv", ["fused.py", "--model"])
    fused.main()
    said = capsys.readouterr().out
    assert all(case.name in said for case in fused.CASES)
