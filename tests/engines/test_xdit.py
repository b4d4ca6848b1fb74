"""What xDiT's registry of attention functions asks of one, without xDiT: its arguments, its shapes, and what it leaves to another."""

import pytest
import torch
import torch.nn.functional as F
from engine_cases import BLOCKS, CASES, CONFIG, SIGMAS, full, session_of, token_order
from svg2_pack.svg2_core import CallSite, Layout
from svg2_pack.svg2_core.adapters import Evaluation
from svg2_pack.svg2_core.adapters.xdit import attention

GPUS = 2


class Dense:
    """The function that was registered before: notes what it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, query, key, value, dropout_p, is_causal, attention_kwargs=None):
        self.asked.append({"dropout_p": dropout_p, "is_causal": is_causal, "attention_kwargs": attention_kwargs})
        return F.scaled_dot_product_attention(query, key, value, is_causal=bool(is_causal)), "logsumexp"


def usp(function, query, key, value, **more):
    """As xDiT's USP calls it: three by place, the others by name."""
    return function(query, key, value, **{"dropout_p": 0.0, "is_causal": False, "attention_kwargs": None, **more})


def sampled(case: str, function, gpus: int, heads: slice, cut: bool = False):
    """Each answer of a run in which this process has these heads, without padding, and its report. cut: keys come without theirs."""
    session, outs = session_of(CONFIG), []
    for step, sigma in enumerate(SIGMAS[:-1]):
        with Evaluation(session, lambda block: token_order(CASES[case], block, gpus), sigma=sigma, conditioning="positive", blocks=BLOCKS):
            for block in range(BLOCKS):
                order = token_order(CASES[case], block, gpus)
                q, k, v = (order.scatter(x)[:, heads].contiguous() for x in full(CASES[case], step, block))
                kept = order.tokens - (order.padding_behind if cut else 0)
                out, logsumexp = usp(function, q, k[:, :, :kept], v[:, :, :kept], attention_kwargs={"valid_kv_len": kept} if cut else None)
                assert logsumexp is None and out.shape == q.shape and out.dtype == q.dtype
                outs.append(order.gather(out))
    return outs, session.report(completed=True)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_process_answers_for_its_heads(case, cut):
    """Together as a session with all heads: which ones a process has, its place among the others says."""
    expected, session = [], session_of(CONFIG)
    for step, sigma in enumerate(SIGMAS[:-1]):
        session.at(sigma)
        for block in range(BLOCKS):
            site = CallSite(step, block, BLOCKS, rows=(("positive", 0),))
            expected.append(session.attend(*full(CASES[case], step, block), Layout(CASES[case].text, CASES[case].video), site).out)
    dense = Dense()
    of_ranks = [sampled(case, attention(dense, rank=lambda rank=rank: rank), GPUS, slice(2 * rank, 2 * rank + 2), cut) for rank in range(GPUS)]
    for right, *parts in zip(expected, *(outs for outs, _ in of_ranks), strict=True):
        assert torch.equal(torch.cat(parts, 1), right)
    for _, report in of_ranks:
        assert report.sparse_calls == len(expected) and report.dense_calls == {} and report.cold_calls == 0
    assert len(dense.asked) == GPUS, "each makes one dense call, for a time to compare with"


NOT_OURS = {
    "causal": ({"is_causal": True}, 1, "causal attention"),
    "dropout": ({"dropout_p": 0.1}, 1, "dropout"),
    "ring": ({}, 2, "ring attention over 2 GPUs"),
    "mask": ({"attention_kwargs": {"attn_mask": torch.ones(1, 1, 1, 252, dtype=torch.bool), "thw": (1, 2, 3)}}, 1, "ask for attn_mask"),
    "keys by index": ({"attention_kwargs": {"indices_k": torch.arange(252)}}, 1, "ask for indices_k"),
    "unknown": ({"attention_kwargs": {"something": 1, "valid_kv_len": 252}}, 1, "ask for something"),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_the_other_function_answers_what_sparse_attention_is_not(name):
    """As it was asked, to the last argument, and it is told why."""
    more, ring, why = NOT_OURS[name]
    dense, session, order = Dense(), session_of(CONFIG), token_order(CASES["wan"], 0, GPUS)
    q, k, v = (order.scatter(x) for x in full(CASES["wan"], 0, 0))
    with Evaluation(session, order, sigma=1.0, blocks=1):
        out, logsumexp = usp(attention(dense, ring=lambda: ring), q, k, v, **more)
    assert logsumexp == "logsumexp" and torch.equal(out, usp(Dense(), q, k, v, **more)[0])
    (asked,) = dense.asked
    expected = {"dropout_p": 0.0, "is_causal": False, "attention_kwargs": None, **more}
    assert asked.keys() == expected.keys() and all(asked[key] is expected[key] for key in asked)
    report = session.report(completed=True)
    assert report.dense_calls == {"unknown_layout": 1} and why in report.notices[0]


def test_other_lengths_are_no_block():
    """A cross-attention, and a text that comes as joint tensors, which queries have on each GPU and keys once."""
    session, dense, order = session_of(CONFIG), Dense(), token_order(CASES["h3"], 0, GPUS)
    function = attention(dense)
    q, k, v = (order.scatter(x) for x in full(CASES["h3"], 0, 0))
    with Evaluation(session, order, sigma=1.0, conditioning="positive", blocks=1):
        usp(function, q, k[:, :, :8], v[:, :, :8])
        usp(function, F.pad(q, (0, 0, 0, 6)), k, v)
        assert usp(function, q, k, v)[1] is None
    report = session.report(completed=True)
    assert (report.sparse_calls, report.block_labels, len(dense.asked)) == (1, ["0"], 2)


def test_outside_an_evaluation_it_is_the_other_function():
    dense, x = Dense(), torch.randn(1, 2, 252, 32)
    assert torch.equal(usp(attention(dense), x, x, x)[0], usp(Dense(), x, x, x)[0]) and len(dense.asked) == 1
