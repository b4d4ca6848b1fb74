"""One report of several processes: sums, weighed means, and what only some of them tell."""

import pytest
import torch
from svg2_pack.svg2_core.merged_report import merge
from svg2_pack.svg2_core.reasons import Reason
from svg2_pack.svg2_core.stats import RunReport, RunStats


def a_run(densities: list[float], refused: Reason | None = None, remark: str | None = None) -> RunReport:
    """Blocks in one step, each with a sparse call of that density, then one more that was refused."""
    stats = RunStats()
    watch = stats.model_call(0, 1.0, torch.device("cpu"))
    for block, density in enumerate(densities):
        stats.sparse_call(0, str(block), 500, torch.tensor(density), "torch", error=torch.tensor(density / 10))
    if refused:
        stats.dense_call(refused, str(len(densities)), "why", step=0)
    if remark:
        stats.remark(remark, "a sentence", name="x")
    watch.stop()
    return stats.report(completed=True, settings={"preset": "auto"})


def test_calls_add_up_and_means_are_weighed():
    merged = merge({"GPU 0": a_run([0.1, 0.2]), "GPU 1": a_run([0.6], Reason.OUT_OF_MEMORY, "cache_full")})
    assert merged.sparse_calls == 3 and merged.dense_calls == {"out_of_memory": 1} and merged.sparse_share == pytest.approx(3 / 4)
    assert merged.density == pytest.approx(0.3) and merged.error == pytest.approx(0.03)
    assert merged.block_labels == ["0", "1"] and merged.completed and merged.settings == {"preset": "auto"}
    assert [row[0] for row in merged.density_by_block_and_step] == pytest.approx([0.35, 0.2])
    assert merged.reasons_by_block_and_step == [[None], ["out_of_memory"]] and merged.remarks.keys() == {"cache_full"}
    assert [notice.partition(":")[0] for notice in merged.notices] == ["GPU 1", "GPU 1"]
    assert merged.devices[0] == "GPU 0: density 15.0%, attention error 1.5%, 2 sparse calls, backend torch"
    assert merged.devices[1].endswith("1 sparse calls, backend torch, out_of_memory 1") and "2 GPUs" in merged.summary


def test_what_all_tell_is_told_once():
    merged = merge({"GPU 0": a_run([0.1], remark="a"), "GPU 1": a_run([0.1], remark="a")})
    assert merged.notices == ["a sentence"]


def test_a_process_without_a_report():
    merged = merge({"GPU 0": a_run([0.1]), "GPU 1": None})
    assert not merged.completed and merged.notices == ["GPU 1: no report of this run"] and merged.devices[1] == "GPU 1: no report of this run"
    assert merge({"GPU 0": None}) is None


def test_a_report_survives_the_way():
    """As plain values and back."""
    report = a_run([0.1, 0.2], Reason.WARMUP, "a")
    assert RunReport.from_dict(report.to_dict()) == report
