"""Where sparse is not faster than the run's own dense attention, a notice says so with both times and what to do."""

import time

import pytest
import torch
from svg2_pack.svg2_core.stats import RunStats
from tiny_wan import sample


@pytest.fixture
def slowed(monkeypatch):
    """Each sparse call takes a twentieth of a second more."""
    from svg2_pack.svg2_core import session

    right = session.svg2_attention

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return right(*args, **kwargs)

    monkeypatch.setattr(session, "svg2_attention", slow)


def remarks(stats):
    return [notice for notice in stats.latest().notices if "not faster" in notice]


def test_a_slowed_backend_against_dense_steps(wan, svg2, slowed, caplog):
    patched, stats = svg2(wan, warmup_steps=2)
    sample(patched, steps=5)
    report = stats.latest()
    [notice] = remarks(stats)
    assert report.step_speedup < 1
    dense, sparse = ([s.seconds for s in report.steps[1:] if s.sparse == kind] for kind in (False, True))
    median = sorted(sparse)[len(sparse) // 2]
    assert f"{median:.2f} s instead of {dense[0]:.2f} s" in notice and "min_tokens" in notice and "turbo" in notice
    assert notice in caplog.text


def test_a_slowed_backend_against_the_one_dense_call(wan, svg2, slowed):
    patched, stats = svg2(wan, warmup_steps=0, dense_blocks="")
    sample(patched, steps=3)
    [notice] = remarks(stats)
    report = stats.latest()
    assert f"{report.sparse_call_ms:.1f} ms instead of {report.dense_call_ms:.1f} ms a call" in notice


def test_it_changes_nothing_that_is_computed(wan, svg2, monkeypatch):
    patched, _ = svg2(wan, warmup_steps=1)
    before = sample(patched, steps=3)
    monkeypatch.setattr(RunStats, "_not_faster", lambda *args: None)
    assert torch.equal(sample(patched, steps=3), before)


def test_one_sparse_step_says_nothing(wan, svg2, slowed):
    """Its clusters start from nothing: no measure of the steps to come."""
    patched, stats = svg2(wan, warmup_steps=1)
    sample(patched, steps=2)
    assert stats.latest().sparse_calls and not remarks(stats)
