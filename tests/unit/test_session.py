"""The session of a sampling run, without any engine: what it answers, what it refuses, what it tells."""

from dataclasses import replace

import pytest
import torch
from shortage import short_of_memory
from svg2_pack.svg2_core import CallSite, Layout, Reason, Refusal, Schedule, Session, SVG2Config, svg2_attention
from svg2_pack.svg2_core import session as session_module

CONFIG = SVG2Config(
    density=0.3, q_clusters=6, k_clusters=12, kmeans_init_iters=2, kmeans_iters=1, warmup_fraction=0.0, min_tokens=0, dense_blocks=""
)
SIGMAS = (1.0, 0.7, 0.4, 0.0)
LAYOUT = Layout(8, 300)


def qkv(heads=4, tokens=320, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, tokens, 64, generator=generator) for _ in "qkv"]


def a_session(config=CONFIG, **named) -> Session:
    return Session(Schedule(SIGMAS, config), backend="torch", **named)


def site(step=0, block=0, **named) -> CallSite:
    return CallSite(step, block, 3, rows=(("positive", 0),), **named)


def test_a_run_is_its_calls_each_with_the_past_of_the_one_before():
    session, warm, bits = a_session(), None, []
    for step, sigma in enumerate(SIGMAS[:-1]):
        assert session.at(sigma) == step
        watch = session.stats.model_call(step, sigma, torch.device("cpu"))
        inputs = qkv(seed=step)
        expected = svg2_attention(*inputs, LAYOUT, CONFIG.of_block(0, 3), warm, backend="torch")
        warm = expected.centroids
        answer = session.attend(*inputs, LAYOUT, site(step))
        watch.stop()
        bits.append(torch.equal(answer.out, expected.out))
    report = session.report(completed=True)
    assert bits == [True] * 3
    assert report.sparse_calls == 3 and report.cold_calls == 0 and report.backend == "torch" and report.tokens == 300
    assert [step.sparse for step in report.steps] == [True] * 3 and report.block_labels == ["0"]
    assert report.settings["q_clusters"] == 6 and report.overlays == {}


def test_another_block_conditioning_or_window_is_another_past():
    session, inputs = a_session(), qkv()
    session.attend(*inputs, LAYOUT, site())
    session.at(0.7)
    of_others = [
        session.attend(*inputs, LAYOUT, changed).out
        for changed in (site(1, 1), replace(site(1), window=(1, 2)), replace(site(1), nth=1), replace(site(1), rows=()))
    ]
    cold = svg2_attention(*inputs, LAYOUT, CONFIG, backend="torch").out
    warm = session.attend(*inputs, LAYOUT, site(1)).out
    assert all(torch.equal(out, cold) for out in of_others[:1]) and not torch.equal(warm, cold)
    assert session.stats.cold[1] == 4


def test_either_memory_order():
    """[B, N, H, D] by its strides: the same bits, in the same order."""
    inputs = qkv()
    expected = a_session().attend(*inputs, LAYOUT, site()).out
    kept = [x.transpose(1, 2).contiguous() for x in inputs]
    out = a_session().attend(*(x.transpose(1, 2) for x in kept), LAYOUT, site()).out
    assert torch.equal(out, expected) and out.transpose(1, 2).is_contiguous()


def test_heads_shared_out_are_the_heads_together():
    inputs = qkv()
    whole = a_session().attend(*inputs, LAYOUT, site()).out
    shares = [
        a_session().attend(*(x[:, first : first + 2] for x in inputs), LAYOUT, site(first_head=first)).out for first in (0, 2)
    ]
    assert torch.equal(torch.cat(shares, 1), whole)


@pytest.mark.parametrize(
    "changes, where, reason",
    [
        ({"warmup_steps": 1}, {}, Reason.WARMUP),
        ({"end_percent": 0.3}, {"step": 2}, Reason.PAST_END),
        ({"dense_blocks": "-1"}, {"block": 2}, Reason.DENSE_BLOCK),
        ({"min_tokens": 301}, {}, Reason.SHORT_SEQUENCE),
        ({"k_clusters": 301}, {}, Reason.SHORT_SEQUENCE),
    ],
)
def test_what_the_settings_keep_dense(changes, where, reason):
    session = a_session(replace(CONFIG, **changes))
    refusal = session.attend(*qkv(), LAYOUT, site(**where))
    assert isinstance(refusal, Refusal) and refusal.reason is reason
    assert session.report(completed=False).dense_calls == {reason.value: 1}


def test_gradients_and_mixed_dtypes_are_refused():
    q, k, v = qkv()
    assert a_session().attend(q.requires_grad_(), k, v, LAYOUT, site()).reason is Reason.GRADIENTS
    with torch.no_grad():
        assert a_session().attend(q, k, v.half(), LAYOUT, site()).reason is Reason.UNSUPPORTED_DTYPE


@pytest.mark.parametrize("enough", [2, 0])
def test_short_of_memory(monkeypatch, enough):
    """Fewer heads at a time, down to one; then a refusal, and the next call does not try more again."""
    small, tried = short_of_memory(session_module.svg2_attention, heads=enough)
    monkeypatch.setattr(session_module, "svg2_attention", small)
    session, inputs = a_session(), qkv()
    answers = [session.attend(*inputs, LAYOUT, site(block=block)) for block in (0, 1)]
    if enough:
        assert tried == [None, 2, 2] and torch.equal(answers[0].out, svg2_attention(*inputs, LAYOUT, CONFIG.of_block(0, 3), backend="torch").out)
    else:
        assert tried == [None, 2, 1, 1]
        assert [(answer.reason, answer.detail) for answer in answers] == [(Reason.OUT_OF_MEMORY, "CUDA out of memory")] * 2


def test_a_backend_by_a_name_it_does_not_have():
    with pytest.raises(ValueError, match="backend"):
        Session(Schedule(SIGMAS, CONFIG), backend="tritn")


def test_a_run_without_dense_calls_times_one_for_comparison():
    """In its second sparse step, once; an engine without room for it goes on without."""
    session, made = a_session(), []
    for step, sigma in enumerate(SIGMAS[:-1]):
        session.at(sigma)
        session.attend(*qkv(), LAYOUT, site(step))
        session.compare(torch.device("cpu"), step, lambda step=step: made.append(step))
    assert made == [1] and session.report(completed=True).dense_call_ms is not None

    def no_room():
        raise torch.OutOfMemoryError

    session = a_session()
    for step, sigma in enumerate(SIGMAS[:-1]):
        session.at(sigma)
        session.attend(*qkv(), LAYOUT, site(step))
        session.compare(torch.device("cpu"), step, no_room)
    assert session.report(completed=True).dense_call_ms is None
