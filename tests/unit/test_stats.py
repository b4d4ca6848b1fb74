"""RunStats adds up what ran; StatsHandle keeps the last few reports."""

import json
import time

import pytest
import torch
from svg2_pack.svg2_core.reasons import Reason
from svg2_pack.svg2_core.stats import RunStats, StatsHandle

CPU = torch.device("cpu")


def density(value):
    return torch.tensor(value)


def two_step_run() -> RunStats:
    """Step 0 dense; step 1 sparse in blocks 1 and 2 (block 2 twice: cond and uncond), block 0 dense throughout."""
    stats = RunStats()
    for step, sigma in ((0, 1.0), (1, 0.5), (1, 0.5)):
        watch = stats.model_call(step, sigma, CPU)
        time.sleep(0.01)
        watch.stop()
    for block in "012":
        stats.dense_call(Reason.WARMUP, block)
    stats.dense_call(Reason.DENSE_BLOCK, "0")
    stats.sparse_call(1, "1", 1000, density(0.2), "torch")
    stats.sparse_call(1, "2", 1200, density(0.3), "torch")
    stats.sparse_call(1, "2", 1200, density(0.7), "torch")
    for _ in range(5):
        stats.dense_call(Reason.NOT_VIDEO_SELF_ATTENTION)
    stats.dense_call(Reason.NO_RUN)
    return stats


def test_report():
    report = two_step_run().report(completed=True)
    assert report.completed and report.backend == "torch" and report.tokens == 1200
    assert report.density == pytest.approx(0.4)  # of the three sparse calls
    assert report.sparse_calls == 3
    assert report.sparse_share == pytest.approx(3 / 7)  # cross-attention and calls outside a run are no candidates
    assert report.dense_calls == {"warmup": 3, "dense_block": 1}
    assert report.block_labels == ["0", "1", "2"]
    assert report.density_by_block_and_step[0] == [None, None]
    assert report.density_by_block_and_step[1] == [None, pytest.approx(0.2)]
    assert report.density_by_block_and_step[2] == [None, pytest.approx(0.5)]
    assert [step.index for step in report.steps] == [0, 1]
    assert [step.sigma for step in report.steps] == [1.0, 0.5]
    assert [step.sparse for step in report.steps] == [False, True]
    assert report.steps[0].density is None and report.steps[1].density == pytest.approx(0.4)


def test_times_add_up_per_step():
    report = two_step_run().report(completed=True)
    assert 0.01 <= report.steps[0].seconds < 0.02 + report.seconds
    assert report.steps[1].seconds >= 0.02
    assert sum(step.seconds for step in report.steps) <= report.seconds


def test_report_is_json():
    as_dict = two_step_run().report(completed=False).to_dict()
    again = json.loads(json.dumps(as_dict, allow_nan=False))
    assert again == as_dict
    assert again["completed"] is False and again["dense_calls"]["warmup"] == 3 and len(again["steps"]) == 2


def test_an_empty_run():
    """Interrupted before its first step."""
    report = RunStats().report(completed=False)
    assert report.density is None and report.sparse_share == 0 and report.sparse_calls == 0
    assert report.steps == [] and report.block_labels == [] and report.dense_calls == {}
    json.dumps(report.to_dict(), allow_nan=False)
    assert "every call ran dense" in report.summary
    assert "do not announce" in RunStats().report(completed=True).summary, "a whole run without one evaluation"


def test_summary_line():
    summary = two_step_run().report(completed=True).summary
    assert "\n" not in summary
    for part in ("1,200 tokens", "40.0%", "torch", "43% of calls sparse", "1 of 2 steps", "warmup 3", "dense_block 1"):
        assert part in summary, part
    assert "not_video" not in summary


def test_summary_of_a_dense_run():
    stats = RunStats()
    stats.model_call(0, 1.0, CPU).stop()
    stats.dense_call(Reason.SHORT_SEQUENCE, "0", "320 < 8,192 tokens")
    summary = stats.report(completed=True).summary
    assert "every call ran dense" in summary and "short_sequence 1" in summary


def test_first_of_a_reason():
    stats = RunStats()
    assert stats.dense_call(Reason.SHORT_SEQUENCE, "0", "5 tokens")
    assert not stats.dense_call(Reason.SHORT_SEQUENCE, "1", "5 tokens")
    assert stats.dense_call(Reason.WARMUP)


def test_notices_are_what_the_user_should_know():
    """With their detail, once each; what the settings ask for is no notice."""
    stats = RunStats()
    for reason in Reason:
        stats.dense_call(reason, detail="because")
        stats.dense_call(reason, detail="again")
    notices = stats.report(completed=True).notices
    assert len(notices) == sum(not reason.expected for reason in Reason)
    assert any(Reason.KERNEL_FAILED.sentence in n and "because" in n for n in notices)
    assert not any(Reason.WARMUP.sentence in n or "again" in n for n in notices)


def test_counting_does_not_touch_the_density():
    """A density stays where it is until the report: reading it would wait for the device."""
    stats = RunStats()
    value = density(0.25)
    stats.sparse_call(0, "0", 10, value, "torch")
    value.fill_(0.75)
    assert stats.report(completed=True).density == 0.75


def test_the_handle_keeps_the_last_four():
    handle = StatsHandle()
    assert handle.latest() is None and handle.reports() == []
    reports = [RunStats().report(completed=True) for _ in range(6)]
    for report in reports:
        handle.add(report)
    assert handle.latest() is reports[-1]
    kept = handle.reports()
    assert len(kept) == 4 and all(a is b for a, b in zip(kept, reports[2:], strict=True))
    kept.clear()
    assert len(handle.reports()) == 4


class Watch:
    """A region that took so many seconds, or was never left (None)."""

    def __init__(self, seconds):
        self.seconds = lambda: seconds or 0.0


def test_speeds_are_ratios_of_medians():
    stats = RunStats()
    stats._dense_watches = [Watch(s) for s in (9.0, 0.4, 0.5, 0.4)]  # the first loads things
    stats._sparse_watches.extend(Watch(s) for s in (0.1, 0.1, 7.0, None))  # one compiled, one failed
    stats._sigmas = {0: 1.0, 1: 0.8, 2: 0.6, 3: 0.4}
    stats._watches = [(0, Watch(30.0)), (1, Watch(6.0)), (2, Watch(2.0)), (3, Watch(1.0)), (3, Watch(1.0))]
    for step in (0, 1):
        stats.dense_call(Reason.WARMUP, "0", step=step)
    for step in (2, 3):
        stats.sparse_call(step, "0", 10, density(0.1), "torch")
    report = stats.report(completed=True)
    assert report.dense_call_ms == pytest.approx(450) and report.sparse_call_ms == pytest.approx(100)
    assert report.attention_speedup == pytest.approx(4.5)
    assert report.step_speedup == pytest.approx(3.0), "without the first step"


def test_steps_that_did_not_run_have_no_speed():
    """Another node skips steps (EasyCache): no time, no attention. And an interruption cuts the last one short."""
    stats = RunStats()
    stats._sigmas = {step: 1.0 - step / 10 for step in range(6)}
    seconds = (9.0, 6.0, 2.0, 0.001, 0.001, 0.5)
    stats._watches = list(enumerate(map(Watch, seconds)))
    for step in (0, 1):
        stats.dense_call(Reason.WARMUP, "0", step=step)
    for step in (2, 5):
        stats.sparse_call(step, "0", 10, density(0.1), "torch")
    assert stats.report(completed=False).step_speedup == pytest.approx(3.0)
    assert stats.report(completed=True).step_speedup == pytest.approx(6.0 / 1.25)


def test_no_speed_without_both_kinds():
    stats = RunStats()
    watch = stats.dense_watch(CPU)
    watch.stop()
    assert stats.report(True).attention_speedup is None and stats.report(True).step_speedup is None


def test_timed_calls_are_bounded():
    stats = RunStats()
    dense = [stats.dense_watch(CPU) for _ in range(300)]
    assert sum(watch is not None for watch in dense) == RunStats.TIMED
    for _ in range(300):
        stats.sparse_watch(CPU).stop()
    assert len(stats._sparse_watches) == RunStats.TIMED


def test_reasons_by_block_and_step():
    stats = RunStats()
    for step in (0, 1):
        stats.model_call(step, 1.0 - step, CPU).stop()
    stats.dense_call(Reason.WARMUP, "0", "", 0)
    stats.dense_call(Reason.WARMUP, "1", "", 0)
    stats.dense_call(Reason.DENSE_BLOCK, "0", "", 1)
    stats.sparse_call(1, "1", 10, density(0.25), "torch")
    assert stats.read_with(torch.tensor(0.5)) == 0.5
    assert stats.blocks_at(1) == [("0", None, "dense_block"), ("1", 0.25, None)]
    report = stats.report(True, {"top_p": 0.5})
    assert report.reasons_by_block_and_step == [["warmup", "dense_block"], ["warmup", None]]
    assert report.density_by_block_and_step == [[None, None], [None, 0.25]]
    assert report.settings == {"top_p": 0.5} and report.device == "cpu"


def test_errors_cold_calls_and_remarks():
    stats = RunStats()
    for step in (0, 1):
        stats.model_call(step, 1.0 - step / 2, CPU).stop()
    known = {"error": torch.tensor(0.1), "expected_error": torch.tensor(0.4), "text_share": 0.02}
    stats.sparse_call(0, "0", 10, density(0.2), "torch", cold=True, **known)
    stats.sparse_call(1, "0", 10, density(0.2), "torch", cold=True, **{**known, "error": torch.tensor(0.3)})
    assert stats.read_with(torch.tensor(3.0)) == 3.0  # read on the way, as a run does
    stats.sparse_call(1, "1", 10, density(0.4), "torch")
    assert stats.remark("cache_full", "no room") and not stats.remark("cache_full", "no room")
    report = stats.report(completed=True)
    assert report.error == pytest.approx(0.2), "over the calls that have one"
    assert report.error_by_block_and_step == [[pytest.approx(0.1), pytest.approx(0.3)], [None, None]]
    assert report.expected_error_by_block_and_step == [[pytest.approx(0.4), pytest.approx(0.4)], [None, None]]
    assert report.density_by_block_and_step == [[pytest.approx(0.2), pytest.approx(0.2)], [None, pytest.approx(0.4)]]
    assert report.cold_calls == 1, "not those of the first sparse step"
    assert report.notices == ["no room"] and report.text_share == 0.02
    assert "density 26.7% (text 2.0%), attention error 20.0%" in report.summary
    json.dumps(report.to_dict(), allow_nan=False)
