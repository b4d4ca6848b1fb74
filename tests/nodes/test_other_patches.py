"""Other nodes patch the same model: overrides chain, and none displaces another silently."""

import pytest
import torch
from svg2_pack.svg2_core.metrics import rel_l2
from tiny_wan import sample


class Recorder:
    """Another node's attention override; passes every call on to what was there before."""

    def __init__(self, previous=None):
        self.previous, self.keys = previous, []

    def __call__(self, func, q, k, v, heads, **kwargs):
        self.keys.append(k.shape[1])
        if self.previous is not None:
            return self.previous(func, q, k, v, heads, **kwargs)
        return func(q, k, v, heads, **kwargs)


def override(model, factory):
    model = model.clone()
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = factory(options.get("optimized_attention_override"))
    return model


def test_dense_calls_go_to_the_override_that_was_there(wan, svg2):
    recorder = Recorder()
    patched, stats = svg2(override(wan, lambda _: recorder), warmup_steps=1, dense_blocks="")
    sample(patched)
    assert recorder.keys.count(320) == 3, "self-attention of the warm-up step"
    assert recorder.keys.count(7) == 3 * 4, "every cross-attention"
    assert stats.latest().sparse_calls == 9


def test_an_override_added_later_does_not_displace_us(wan, svg2):
    recorder = Recorder()
    patched, stats = svg2(wan, warmup_steps=1, dense_blocks="")
    sample(override(patched, lambda _: recorder))  # drops ours
    assert stats.latest().sparse_calls == 9
    assert recorder.keys.count(320) == 3


def test_an_override_that_chains_to_us_does_not_loop(wan, svg2, dense_sample):
    patched, stats = svg2(wan, warmup_steps=1, dense_blocks="")
    expected = sample(patched)
    chained = override(patched, Recorder)
    assert torch.equal(sample(chained), expected)
    assert stats.latest().sparse_calls == 9
    assert stats.latest().dense_calls == {"warmup": 3}, "each call is counted once"


def test_the_last_of_two_nodes_counts(wan, svg2, dense_sample):
    first, first_stats = svg2(wan, top_p=0.1)
    second, stats = svg2(first, top_p=1.0)
    assert rel_l2(sample(second), dense_sample) <= 1e-4
    assert first_stats.latest() is None and stats.latest().density == 1
    sample(first)
    assert first_stats.latest().density < 0.9, "the first model is still patched as it was"


def test_unknown_keyword_arguments_reach_the_host(wan, svg2):
    seen = []

    def previous(func, q, k, v, heads, **kwargs):
        seen.append(kwargs.pop("from_the_future", None))
        return func(q, k, v, heads, **kwargs)

    patched, _ = svg2(override(wan, lambda _: previous))
    call = patched.model_options["transformer_options"]["optimized_attention_override"]
    from comfy.ldm.modules.attention import attention_pytorch

    q = torch.randn(1, 10, 256)
    out = call(attention_pytorch, q, q, q, 2, from_the_future=1, transformer_options={})
    assert seen == [1] and out.shape == q.shape


@pytest.fixture
def flash(monkeypatch):
    """The host's `flash` function, in the place of the package it needs; the shapes of its calls."""
    import comfy.ldm.modules.attention as attention

    calls = []

    def function(q, k, v, heads, **kwargs):
        calls.append(tuple(q.shape))
        return attention.attention_pytorch(q, k, v, heads, **kwargs)

    monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, "flash", function)
    return calls


def test_flash_attention_for_the_dense_calls(wan, dense_sample, svg2, flash):
    """It takes the video self-attentions of the dense step and block, and no cross-attention."""
    patched, stats = svg2(wan, top_p=1.0, warmup_steps=1, dense_blocks="0", dense_attention="flash")
    assert rel_l2(sample(patched), dense_sample) <= 1e-5
    dense = stats.latest().dense_calls
    assert dense == {"warmup": 3, "dense_block": 3} and len(flash) == 6 and {shape[1] for shape in flash} == {320}
    flash.clear()
    sample(svg2(wan, warmup_steps=1)[0])
    assert flash == []


def test_flash_attention_that_is_not_there(wan, dense_sample, svg2, caplog):
    patched, _ = svg2(wan, top_p=1.0, dense_attention="flash")
    assert "flash-attn is not installed" in caplog.text
    assert rel_l2(sample(patched), dense_sample) <= 1e-5
    with pytest.raises(ValueError, match="dense_attention: 'sage' is not accepted; it takes auto or flash"):
        svg2(wan, dense_attention="sage")
