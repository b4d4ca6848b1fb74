"""Odd sizes, one frame, one token, and where too short begins: sparse and equal to dense, or dense and said so."""

import math

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.metrics import rel_l2

VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
EVERYWHERE = {"top_p": 1.0, "warmup_steps": 0, "dense_blocks": ""}

# Latent pixels per token along a side, and whether the host pads a latent that they do not divide.
FAMILIES = {
    "wan2.1 t2v": (2, True),
    "hunyuan_video t2v": (2, False),
    "hunyuan_video 1.5 t2v": (1, True),
    "cosmos t2v": (2, False),
    "cosmos predict2 t2i": (2, True),
    "cogvideox t2v": (2, True),  # whose sequence must have the very length that the latent asks for
}
# Frames, height, width. 26 x 38 and its turn are 832 x 1216 and 1216 x 832 at a quarter of the size.
EVEN = [(1, 16, 16), (1, 26, 38), (1, 38, 26), (2, 64, 2), (33, 2, 2), (1, 2, 2)]
ODD = [(3, 15, 17), (1, 1, 65), (2, 1, 1)]
CASES = [("wan2.1 t2v", size) for size in EVEN + ODD]
CASES += [(n, size) for n, (side, pads) in FAMILIES.items() for size in [(1, 26, 38), (33, 2, 2), *ODD[:2] * (pads or side == 1)] if n != "wan2.1 t2v"]
REFUSED = [(n, (3, 15, 17)) for n, (side, pads) in FAMILIES.items() if not pads and side > 1]


def sample(name, model, size=(2, 16, 16), steps=1):
    channels = VARIANTS[name].latent().shape[1]
    return tiny_models.sample(VARIANTS[name], model, steps=steps, shape=torch.zeros(1, channels, *size))


def tokens(name, size) -> int:
    side, _ = FAMILIES[name]
    return size[0] * math.ceil(size[1] / side) * math.ceil(size[2] / side)


@pytest.mark.parametrize("name, size", CASES, ids=str)
def test_equals_dense_at_any_size(model, svg2, name, size):
    patched, stats = svg2(model(name), **EVERYWHERE)
    # In two steps: CogVideoX's first one leaves nothing of what the model says.
    assert rel_l2(sample(name, patched, size, steps=2), sample(name, model(name), size, steps=2)) <= 1e-5
    report = stats.latest()
    assert report.sparse_calls == 2 * VARIANTS[name].blocks and report.dense_calls == {}
    assert report.tokens == tokens(name, size)


@pytest.mark.parametrize("name, size", REFUSED, ids=str)
def test_what_the_host_cannot_do_fails_as_without_us(model, svg2, name, size):
    with pytest.raises((RuntimeError, AssertionError)) as theirs:
        sample(name, model(name), size)
    patched, stats = svg2(model(name), **EVERYWHERE)
    with pytest.raises(type(theirs.value)) as ours:
        sample(name, patched, size)
    assert str(ours.value) == str(theirs.value) and not stats.latest().completed


# The text of HunyuanVideo does not count among the tokens.
ENDS = [("wan2.1 t2v", (2, 16, 16)), ("hunyuan_video t2v", (2, 16, 16)), ("cosmos t2v", (1, 2, 4))]


@pytest.mark.parametrize("knob, name, size", [(knob, *end) for knob, end in zip(("min_tokens", "q_clusters", "k_clusters"), ENDS, strict=True)], ids=str)
def test_one_token_too_few(model, svg2, name, size, knob):
    enough, few = tokens(name, size), tokens(name, size) + 1
    dense = sample(name, model(name), size)
    patched, stats = svg2(model(name), **EVERYWHERE, **{knob: enough})
    assert rel_l2(sample(name, patched, size), dense) <= 1e-5
    assert stats.latest().sparse_calls == VARIANTS[name].blocks and stats.latest().dense_calls == {}

    patched, stats = svg2(model(name), **EVERYWHERE, **{knob: few})
    assert torch.equal(sample(name, patched, size), dense)
    assert stats.latest().dense_calls == {"short_sequence": VARIANTS[name].blocks} and stats.latest().sparse_calls == 0
    assert any(f"{enough:,} < {few:,} tokens" in notice for notice in stats.latest().notices)


@pytest.mark.parametrize("name", ["wan2.1 t2v", "hunyuan_video t2v"])
def test_a_cluster_for_each_token(model, svg2, name):
    """What stands in for a skipped key is then that key itself: dense again, however little is selected."""
    n, dense = tokens(name, (2, 16, 16)), sample(name, model(name))
    knobs = {**EVERYWHERE, "top_p": 0.2, "q_clusters": n, "k_clusters": n}
    patched, stats = svg2(model(name), **knobs, compensation="centroid")
    assert rel_l2(sample(name, patched), dense) <= 1e-5
    assert stats.latest().density < 0.5 and stats.latest().sparse_calls == VARIANTS[name].blocks
    patched, _ = svg2(model(name), **knobs, compensation="off")
    assert rel_l2(sample(name, patched), dense) > 1e-3, "what is skipped must matter"
