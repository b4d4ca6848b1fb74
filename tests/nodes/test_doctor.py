"""The Doctor tells the truth about this machine."""

import csv
import re
import time

import pytest
import torch
from svg2_pack.svg2_core.ops import registry

CPU = torch.device("cpu")


@pytest.fixture
def report(host, monkeypatch, tmp_path):
    """`report(measure)` runs the node, whose records go to this test's folder. -> its text"""
    import folder_paths
    from svg2_pack.nodes.doctor import SVG2Doctor

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))

    def run(measure: bool = False) -> str:
        output = SVG2Doctor.execute(measure)
        assert output.ui.as_dict()["text"] == (output.result[0],)
        return output.result[0]

    yield run
    for name in filter(registry.retired, registry.NAMES):  # the others stay tested: interpreted, that takes a while
        registry.reinstate(name)


@pytest.fixture
def small(host, monkeypatch):
    """The module that measures, at sizes that take no time; the errors are as at the real ones, or above."""
    from svg2_pack.nodes.measuring import measure

    monkeypatch.setitem(measure.SIZES, "cpu", ((384, 768), 2, torch.float32))
    monkeypatch.setattr(measure, "EXPECTED_ERROR", 0.5)
    return measure


def test_it_names_every_backend(report, monkeypatch):
    monkeypatch.delenv("SVG2_BACKEND", raising=False)
    text = report()
    assert f"torch: {torch.__version__}" in text
    assert "backend torch: ready" in text and "speed" not in text
    if not torch.cuda.is_available():
        assert "backend cuda: " in text and "needs an NVIDIA GPU" in text
        assert "auto takes: sdpa" in text and "backend sdpa: ready (self-test" in text


def test_a_backend_that_failed_is_tried_again(report):
    registry.retire("torch", RuntimeError("it was a bad day"))
    assert "had failed (RuntimeError: it was a bad day); trying again" in report()
    assert registry.retired("torch") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
def test_it_measures_and_saves_a_record(report, small, monkeypatch, tmp_path):
    monkeypatch.delenv("SVG2_BACKEND", raising=False)
    text = report(measure=True)
    for tokens in (384, 768):
        assert f"speed at {tokens} tokens, 2 heads of 128 in float32, preset balanced:" in text
    ms = r"(\d+\.\d+) ms, "
    assert len(re.findall(rf"ComfyUI's attention \(attention_\w+\): {ms}relative error 0.0000$", text, re.MULTILINE)) == 2
    for step in ("the first sparse step", "every later step"):
        found = re.findall(rf"SVG2 \(sdpa\), {step}: {ms}[\d.]+x (?:faster|slower), relative error (0\.\d+) \(expected: up to 0.5\), density \d+%", text)
        assert len(found) == 2 and all(0 < float(error) < 0.5 for _, error in found)
    (file,) = (tmp_path / "svg2_doctor").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d{6}\.csv", file.name) and f"record: {file}. " in text and "issue" in text
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert [(row["tokens"], row["stage"]) for row in rows] == [(n, stage) for n in ("384", "768") for stage in ("dense", "whole call cold", "whole call")]
    for row in rows:
        assert row["torch"] == torch.__version__ and row["commit"] and row["processor"] and row["date"] == file.name[:10]
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) and int(row["rounds"]) >= 1
        assert float(row["density"]) == 1 if row["stage"] == "dense" else 0 < float(row["density"]) < 0.5


@pytest.mark.parametrize(("kind", "program"), [("cuda", "run"), ("cpu", "on_cpu")])
def test_a_record_has_the_benchmarks_fields(small, monkeypatch, kind, program):
    import importlib
    from pathlib import Path

    from svg2_pack.nodes.measuring import record

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    fields = importlib.import_module(program).FIELDS
    assert record.FIELDS[kind] == fields
    _, records = small.measure(CPU, "sdpa")
    assert len(records) == 6
    for row in records:
        assert {*record.machine(CPU), *row} >= {*fields}, "save leaves a column empty"


def test_the_errors_are_those_that_are_told(small):
    """Of the made-up activations, by the call's own account and against every row of dense attention."""
    from svg2_pack.svg2_core import Layout, preset_config, svg2_attention
    from svg2_pack.svg2_core.metrics import rel_l2

    q, k, v = small.made_up(CPU, 2_048, 1, torch.float32)
    assert q.shape == (1, 1, 2_048, 128) and q.transpose(1, 2).is_contiguous()
    result = svg2_attention(q, k, v, Layout(0, 2_048), preset_config("balanced", "other"), backend="sdpa")
    error = rel_l2(result.out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert 0.03 < error < 0.1 and result.error.item() == pytest.approx(error, rel=0.5)
    rows = torch.tensor([0, 100, 2_047])
    assert rel_l2(small.exact(q, k, v, rows), torch.nn.functional.scaled_dot_product_attention(q[:, :, rows], k, v)) < 1e-5


def test_a_warm_call_starts_from_slightly_different_inputs(small, monkeypatch):
    real, calls = small.svg2_attention, []

    def watched(q, k, v, layout, config, warm, **kwargs):
        result = real(q, k, v, layout, config, warm, **kwargs)
        calls.append((q, warm, result.centroids))
        return result

    monkeypatch.setattr(small, "svg2_attention", watched)
    monkeypatch.setattr(small, "MOST_ROUNDS", 1)
    monkeypatch.setitem(small.SIZES, "cpu", ((384,), 2, torch.float32))
    small.measure(CPU, "sdpa")
    (q, nothing, _), (before, nothing_either, centroids), (again, warm, _) = calls
    assert nothing is None and nothing_either is None and warm is centroids and again is q
    assert 0.05 < ((before - q).norm() / q.norm()).item() < 0.2


def break_sparse(small, monkeypatch, error: Exception) -> None:
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(small, "svg2_attention", broken)


def test_a_sparse_call_that_fails_is_reported(report, small, monkeypatch, tmp_path):
    break_sparse(small, monkeypatch, RuntimeError("no such kernel"))
    monkeypatch.setenv("SVG2_BACKEND", "sdpa")
    text = report(measure=True)
    assert "backend torch: ready" in text and "auto takes: sdpa" in text
    assert "SVG2 (sdpa), the first sparse step: not measured: it failed (RuntimeError: no such kernel)" in text
    assert re.search(r"ComfyUI's attention \(\w+\): \d", text) and "speed at 768" not in text
    (file,) = (tmp_path / "svg2_doctor").iterdir()
    assert [row["stage"] for row in csv.DictReader(file.open(encoding="utf-8"))] == ["dense"]


def test_out_of_memory_is_a_sentence(small, monkeypatch):
    break_sparse(small, monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB"))
    lines, records = small.measure(CPU, "sdpa")
    assert any(line.endswith("the device has too little free memory for it; unload models, then run this again") for line in lines)
    assert len(records) == 1

    def broken(*args):
        raise torch.OutOfMemoryError("not even the inputs")

    monkeypatch.setattr(small, "made_up", broken)
    assert small.measure(CPU, "sdpa") == (["speed at 384 tokens: not measured: the device has too little free memory for it; unload models, then run this again"], [])


def test_a_wrong_result_is_not_timed(small, monkeypatch):
    real = small.svg2_attention

    def wrong(*args, **kwargs):
        result = real(*args, **kwargs)
        result.out.mul_(torch.nan)
        return result

    monkeypatch.setattr(small, "svg2_attention", wrong)
    lines, records = small.measure(CPU, "sdpa")
    assert any("its error is nan, where at most 0.5 is expected; please report it" in line for line in lines)
    assert [row["stage"] for row in records] == ["dense"]


def test_a_slow_machine_ends_it_in_time(small, monkeypatch):
    """A dense call that takes all the time is the last; one that takes much of it keeps the second size from being tried."""
    real, calls = small.optimized_attention, []

    def slow(q, *args, **kwargs):
        calls.append(q.shape[2])
        time.sleep(seconds)
        return real(q, *args, **kwargs)

    monkeypatch.setattr(small, "optimized_attention", slow)
    seconds = 0.3
    monkeypatch.setattr(small, "SECONDS", 0.2)
    (line,), records = small.measure(CPU, "sdpa")
    assert re.fullmatch(r"speed at 384 tokens: not measured: ComfyUI's attention \(slow\) took 0\.\d s, and 0.2 s are set aside for all of this", line)
    assert records == [] and calls == [384]

    calls.clear()
    seconds = 1.0
    monkeypatch.setattr(small, "SECONDS", 4.0)
    lines, records = small.measure(CPU, "sdpa")
    assert any(re.match(r"speed at 768 tokens: not measured: it would take about \d+ s here, and \d s of the 4 s set aside are left", line) for line in lines)
    assert {row["tokens"] for row in records} == {384} and set(calls) == {384} and len(calls) <= 4


def test_what_kernels_compile_is_not_counted(small):
    budget = small.Budget()
    before = budget.left()
    budget.excuse(30.0)
    assert budget.left() == pytest.approx(before + 30, abs=1) and budget.first_use == 30


def test_other_devices_and_no_backend_are_sentences(host, monkeypatch):
    from svg2_pack.nodes import doctor
    from svg2_pack.svg2_core.reasons import Reason, Refusal

    assert doctor.speed_lines(torch.device("mps")) == ["speed: not measured: this is for NVIDIA GPUs and CPUs, not for mps"]
    monkeypatch.setattr(registry, "choose", lambda *args: Refusal(Reason.NO_BACKEND, "triton: not installed"))
    assert doctor.speed_lines(CPU) == ["speed: not measured, because no backend is ready (triton: not installed)"]


def test_a_record_that_cannot_be_saved_is_a_sentence(small, monkeypatch):
    from svg2_pack.nodes import doctor

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(doctor, "save", full)
    assert doctor.speed_lines(CPU)[-1] == "record: it could not be saved (no space left on device); copy this text instead"


def test_where_to_send_it(host, monkeypatch):
    from pathlib import Path

    from svg2_pack.nodes.measuring import record

    monkeypatch.setattr(record, "_project", lambda: '[project.urls]\nRepository = "https://example.org/a/b.git"\n')
    assert "attach it to an issue at https://example.org/a/b/issues;" in record.how_to_send(Path("x.csv"))
    monkeypatch.setattr(record, "_project", lambda: "")
    assert "attach it to an issue where you got the pack;" in record.how_to_send(Path("x.csv"))


def test_a_workflow_from_before_the_input_stays_valid(host):
    from svg2_pack.nodes.doctor import SVG2Doctor

    (item,) = SVG2Doctor.define_schema().inputs
    assert item.id == "measure" and item.optional and item.default is True
    assert SVG2Doctor.fingerprint_inputs() > 0 and SVG2Doctor.fingerprint_inputs(measure=False) > 0
