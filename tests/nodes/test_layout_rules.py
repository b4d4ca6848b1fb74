"""What the layouts cannot prove stays dense and says so; what the general rule can prove needs no entry of its own."""

import copy
import types
from dataclasses import replace

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.metrics import rel_l2

VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
EVERYWHERE = {"warmup_steps": 0, "dense_blocks": ""}


@pytest.fixture
def no_families(host, monkeypatch):
    """As if no model had an entry: the general rule serves all."""
    from svg2_pack.nodes.patching import layouts

    monkeypatch.setattr(layouts, "FAMILIES", ())


def dense_and_sparse(variant, svg2, model=None, **inputs):
    """-> (dense sample, sample with the node, report)"""
    model = variant.build() if model is None else model
    patched, stats = svg2(model, **EVERYWHERE, **inputs)
    dense = tiny_models.sample(variant, model)
    return dense, tiny_models.sample(variant, patched), stats.latest()


@pytest.mark.parametrize("name", ["wan2.1 t2v", "cosmos t2v", "cosmos predict2 v2w", "ltxv t2v", "kandinsky5 lite t2v"])
def test_the_general_rule(model, svg2, no_families, name):
    """Queries and keys are the latent's tokens and nothing else."""
    dense, sample, report = dense_and_sparse(VARIANTS[name], svg2, model(name), top_p=1.0)
    assert rel_l2(sample, dense) <= 1e-4
    assert report.sparse_calls == 2 * VARIANTS[name].blocks and report.dense_calls == {}


@pytest.mark.parametrize("name", ["hunyuan_video t2v", "cogvideox t2v", "minimax t2v", "wan2.1 phantom", "cosmos predict2 t2i"])
def test_what_the_general_rule_cannot_prove(model, svg2, no_families, name):
    """Text or references within the sequence, or an image."""
    dense, sample, report = dense_and_sparse(VARIANTS[name], svg2, model(name), top_p=0.3)
    assert torch.equal(sample, dense)
    assert report.sparse_calls == 0 and set(report.dense_calls) == {"unknown_layout"} and report.notices


def test_parts_of_a_video_under_masks_of_their_own(svg2, no_families):
    """As LTX-Video with a guide at half strength has them: no call has all queries. The general rule knows no masks."""
    variant = VARIANTS["ltxv guide"]
    conditioning = copy.deepcopy(variant.conditioning())
    conditioning[0][1]["guide_attention_entries"][0]["strength"] = 0.5
    dense, sample, report = dense_and_sparse(replace(variant, conditioning=lambda seed=0: conditioning), svg2, top_p=0.3)
    assert torch.equal(sample, dense)
    assert report.sparse_calls == 0 and set(report.dense_calls) == {"unknown_layout"}
    assert "a part of the video under a mask of its own" in report.notices[0]


@pytest.mark.parametrize(
    "name, strength, factor", [("ltxv t2v", 1.0, 2), ("ltxv t2v", 0.7, 1), ("ltxav t2v", 1.0, 1), ("ltxav t2v", 0.7, 2)]
)
def test_guides_of_ltx(model, svg2, name, factor, strength):
    """The host's own node, as IC-LoRA workflows use it: a guide that is smaller than the video has no tokens between its own. At
    full strength it is a part of the video; below, the video and the guide ask each for itself, and the guide, whose masks differ
    from query to query, stays dense."""
    from comfy.nested_tensor import NestedTensor
    from comfy.utils import pack_latents
    from comfy_extras.nodes_lt import LTXVAddGuide

    class VAE:
        downscale_index_formula = (8, 32, 32)

        def encode(self, pixels):
            f, h, w, _ = pixels.shape
            return torch.randn(1, 128, (f - 1) // 8 + 1, h // 32, w // 32, generator=torch.Generator().manual_seed(5))

    variant = VARIANTS[name]
    positive, negative, latent = LTXVAddGuide.execute(
        variant.conditioning(), variant.conditioning(seed=9), VAE(), {"samples": torch.zeros(1, 128, 5, 8, 8)},
        torch.rand(33, 256, 256, 3, generator=torch.Generator().manual_seed(1)), 0, strength,
        iclora_parameters={"reference_downscale_factor": factor},
    ).result  # fmt: skip
    assert (latent["noise_mask"] < 0).any() == (factor > 1)
    shape, mask = latent["samples"], latent["noise_mask"]
    if name == "ltxav t2v":
        shape, mask = NestedTensor([shape, torch.zeros(1, 8, 31, 16)]), NestedTensor([mask, torch.ones(1, 8, 31, 16)])

    def run(guided):
        out = tiny_models.tiny_wan.sample(guided, steps=2, shape=shape, positive=positive, negative=negative, noise_mask=mask)
        return pack_latents(out.unbind())[0] if out.is_nested else out

    dense = run(model(name))
    patched, stats = svg2(model(name), **EVERYWHERE, top_p=1.0)
    assert rel_l2(run(patched), dense) <= 1e-4
    report = stats.latest()
    if strength == 1:
        assert report.dense_calls == {} and report.sparse_calls == 2 * variant.blocks
        assert report.tokens == 320 + 320 // factor**2
    else:
        assert report.sparse_calls == 2 * variant.blocks and report.dense_calls == {"unknown_layout": 2 * variant.blocks}
        assert report.tokens == 320 and "a part of the video under a mask of its own" in report.notices[0]


def animate_2(text=7, **inputs):
    """Wan Animate 2 with so many text tokens, and other inputs than its own."""

    def conditioning(seed=0):
        [[embeddings, extra]] = tiny_models.ANIMATE_2.conditioning(seed)
        return [[embeddings.repeat(1, -(-text // 7), 1)[:, :text], {**extra, **inputs}]]

    return replace(tiny_models.ANIMATE_2, conditioning=conditioning)


@pytest.fixture
def answered(host, monkeypatch):
    """How many queries, over how many keys, each sparse call has."""
    from svg2_pack.svg2_core import session

    lengths = []
    attend = session.svg2_attention

    def watched(q, k, v, *rest, **named):
        lengths.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, *rest, **named)

    monkeypatch.setattr(session, "svg2_attention", watched)
    return lengths


def test_wan_animate_2_without_a_video_that_drives(svg2, answered):
    """In the steps that its node leaves out: one self-attention in a block."""
    dense, sample, report = dense_and_sparse(animate_2(pose_video_latent=None), svg2, top_p=1.0)
    assert rel_l2(sample, dense) <= 1e-4
    assert answered == [(320, 320)] * 2 * 3 and report.dense_calls == {}


@pytest.mark.parametrize("cached", [False, True])
def test_wan_animate_2(svg2, answered, cached):
    """The video that drives is one too: its self-attentions, over a frame less than the latent has, are sparse. With its cache they
    run in the first evaluation alone."""
    variant = tiny_models.ANIMATE_2

    def run(model):
        model = model.clone()
        if cached:
            model.model_options["transformer_options"]["animate2_cache"] = types.SimpleNamespace(inputs={})
        return tiny_models.sample(variant, model)

    model = variant.build()
    patched, _ = svg2(model, **EVERYWHERE, top_p=1.0)
    assert rel_l2(run(patched), run(model)) <= 1e-4
    assert answered.count((256, 256)) == 3 * (1 if cached else 2)


def test_text_as_long_as_the_video_that_drives(svg2, answered):
    """Its cross-attention cannot be told from its self-attention."""
    dense, sample, _ = dense_and_sparse(animate_2(text=256), svg2, top_p=1.0)
    assert rel_l2(sample, dense) <= 1e-4 and (256, 256) not in answered


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"enable_gqa": True}, "unknown_layout"),
        ({"keys": 64}, "not_video_self_attention"),
        ({"key_width": 64}, "unknown_layout"),
        ({"batch": 2}, "not_video_self_attention"),
        ({"mask": "causal"}, "unsupported_mask"),
    ],
    ids=lambda value: str(value),
)
def test_calls_that_are_not_plain_self_attention(wan, svg2, monkeypatch, change, reason):
    """Made from a real call of the model, inside a run."""
    from svg2_pack.nodes.patching import override

    reasons = []
    answer = override.sparse_or_refusal

    def changed(run, call, options, q, k, v, mask, scale):
        if q.shape[2] == 320 == k.shape[2]:
            width = change.get("key_width", 128)
            x = q.expand(change.get("batch", 1), -1, -1, -1)
            keys, values = (t.expand(x.shape[0], -1, -1, -1)[:, :, : change.get("keys", 320), :width] for t in (k, v))
            causal = torch.ones(320, 320, dtype=torch.bool).tril() if change.get("mask") else None
            refusal = override.not_a_candidate(run, call, change)
            reasons.append((refusal or answer(run, call, options, x, keys, values, causal, scale)).reason.value)
        return answer(run, call, options, q, k, v, mask, scale)

    monkeypatch.setattr(override, "sparse_or_refusal", changed)
    patched, stats = svg2(wan, **EVERYWHERE)
    tiny_models.tiny_wan.sample(patched, steps=1)
    assert reasons == [reason] * 3 and stats.latest().sparse_calls == 3
