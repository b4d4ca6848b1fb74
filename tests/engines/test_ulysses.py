"""Two processes, yunchang's Ulysses attention over gloo, SVG2 between the collectives: as one process with all heads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engine_cases import BLOCKS, CASES, CONFIG, SIGMAS, full, session_of, token_order
from svg2_pack.svg2_core import CallSite, Layout
from svg2_pack.svg2_core.stats import RunReport

pytest.importorskip("yunchang", reason="yunchang is installed on Linux only")
pytestmark = pytest.mark.xdist_group("gloo")  # the processes run once
WORKER = Path(__file__).with_name("gloo_worker.py")
STEPS = len(SIGMAS) - 1


RUNS = (*CASES, "hunyuan:everything", "hunyuan:memory", "hunyuan:gather", "hunyuan:scatter", "wan:causal")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each of two processes came to, by run: they make all of them, one after the other."""
    folder = tmp_path_factory.mktemp("gloo")
    store, outs = folder / "store", [folder / f"{rank}.pt" for rank in (0, 1)]
    running = [
        subprocess.Popen([sys.executable, WORKER, str(rank), store, out, *RUNS], stderr=subprocess.PIPE, text=True)
        for rank, out in enumerate(outs)
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)[-4000:]
    of_ranks = [torch.load(out) for out in outs]
    return {name: [of_rank[name] for of_rank in of_ranks] for name in RUNS}


def gathered(case: str, ranks: list[dict]) -> list[torch.Tensor]:
    """The whole attention's answers `[1, H, text + video, D]`, in order of calls."""
    orders = [token_order(CASES[case], block, 2) for _ in range(STEPS) for block in range(BLOCKS)]
    pairs = zip(*(rank["outs"] for rank in ranks), strict=True)
    return [order.gather(torch.cat(pair, 1).transpose(1, 2)) for order, pair in zip(orders, pairs, strict=True)]


def alone(case: str, config=CONFIG):
    """One process with all heads and no padding: its answers and its report."""
    session, size, outs = session_of(config), CASES[case], []
    for step, sigma in enumerate(SIGMAS[:-1]):
        session.at(sigma)
        watch = session.stats.model_call(step, sigma, torch.device("cpu"))
        for block in range(BLOCKS):
            site = CallSite(step, block, BLOCKS, rows=(("positive", 0),))
            outs.append(session.attend(*full(size, step, block), Layout(size.text, size.video), site).out)
        watch.stop()
    return outs, session.report(completed=True)


def dense(case: str) -> list[torch.Tensor]:
    return [F.scaled_dot_product_attention(*full(CASES[case], step, block)) for step in range(STEPS) for block in range(BLOCKS)]


@pytest.mark.parametrize("case", CASES)
def test_as_one_process_with_all_heads(case, together):
    ranks = together[case]
    expected, whole = alone(case)
    for found, right in zip(gathered(case, ranks), expected, strict=True):
        assert torch.equal(found, right)
    reports = [RunReport.from_dict(rank["report"]) for rank in ranks]
    for report in reports:
        assert report.sparse_calls == STEPS * BLOCKS == whole.sparse_calls and report.dense_calls == {} and report.cold_calls == 0
        assert report.tokens == CASES[case].video and report.block_labels == ["0", "1", "2"] and report.completed
    assert sum(report.density for report in reports) / 2 == pytest.approx(whole.density, rel=1e-4)
    assert all(len(rank["dense"]) == STEPS * BLOCKS + 1 for rank in ranks), "the attention over the text, and one for a time to compare with"


def test_everything_selected_is_dense_attention(together):
    ranks = together["hunyuan:everything"]
    for found, right in zip(gathered("hunyuan", ranks), dense("hunyuan"), strict=True):
        assert (found - right).norm() <= 1e-5 * right.norm()
    assert all(rank["report"]["sparse_calls"] == STEPS * BLOCKS for rank in ranks)


@pytest.mark.parametrize("where", ["memory", "gather", "scatter"])
def test_a_process_short_of_memory_goes_dense_alone(where, together):
    """In the call, or where it puts tokens in order. Its heads are those of dense attention, padding left in, as the engine has it; the
    other's are sparse; nothing hangs."""
    case = CASES["hunyuan"]
    ranks = together[f"hunyuan:{where}"]
    assert ranks[0]["report"]["dense_calls"] == {} and ranks[1]["report"]["dense_calls"] == {"out_of_memory": STEPS * BLOCKS}
    assert ranks[1]["report"]["sparse_calls"] == (STEPS * BLOCKS if where == "scatter" else 0)
    found, (sparse, _) = gathered("hunyuan", ranks), alone("hunyuan")
    for call, right in enumerate(sparse):
        step, block = divmod(call, BLOCKS)
        order = token_order(case, block, 2)
        heads = order.gather(F.scaled_dot_product_attention(*(order.scatter(x) for x in full(case, step, block))))[:, 2:]
        assert torch.equal(found[call][:, :2], right[:, :2])
        assert (found[call][:, 2:] - heads).norm() <= 1e-5 * heads.norm()


def test_what_sparse_attention_is_not_runs_dense_with_a_reason(together):
    for rank in together["wan:causal"]:
        report = RunReport.from_dict(rank["report"])
        assert report.sparse_calls == 0 and report.dense_calls == {"unknown_layout": STEPS * BLOCKS}
        assert any("causal" in notice for notice in report.notices)
