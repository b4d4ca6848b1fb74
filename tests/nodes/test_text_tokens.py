"""Text tokens in HunyuanVideo's sequence: exact in both directions, and without influence where the prompt is padding."""

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.metrics import rel_l2

EVERYWHERE = {"warmup_steps": 0, "dense_blocks": ""}
TEXT, KEPT = 17, 9  # the padded variant's prompt


@pytest.fixture(scope="module")
def padded(host):
    variant = next(v for v in tiny_models.VARIANTS if v.name == "hunyuan_video t2v padded")
    return variant, variant.build()


def perturb_text(svg2, padded, monkeypatch, token: int, **inputs) -> list:
    """Change the key and value of one text token in every sparse call: (before, after, dense before, dense after) of each."""
    from svg2_pack.nodes.patching import override

    answers = []
    answer = override.sparse_or_refusal

    def twice(run, call, options, q, k, v, mask, scale):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, token] *= 0.5
        v2[:, :, token] -= 5
        seen = dict(call.seen)
        after = answer(run, call, options, q, k2, v2, mask, scale)
        call.seen = seen  # the same call once more, not the next one
        run.cache.clear()
        before = answer(run, call, options, q, k, v, mask, scale)
        run.cache.clear()
        dense = [torch.nn.functional.scaled_dot_product_attention(q, *kv, attn_mask=mask[:, None]) for kv in ((k, v), (k2, v2))]
        answers.append((before, after, *dense))
        return before

    monkeypatch.setattr(override, "sparse_or_refusal", lambda *args: twice(*args) if args[3].shape[2] > TEXT else answer(*args))
    variant, model = padded
    patched, stats = svg2(model, **EVERYWHERE, **inputs)
    tiny_models.sample(variant, patched, steps=1)
    assert len(answers) == stats.latest().sparse_calls // 2 == variant.blocks
    return answers


def test_every_video_token_responds_to_a_text_token_as_in_dense_attention(svg2, padded, monkeypatch):
    for before, after, dense_before, dense_after in perturb_text(svg2, padded, monkeypatch, token=KEPT - 1, top_p=1.0):
        response = dense_after - dense_before
        assert ((after - before - response).norm(dim=-1) <= 1e-4 * dense_before.norm(dim=-1)).all(), "each token on its own"
        assert rel_l2((after - before)[:, :, TEXT:], response[:, :, TEXT:]) <= 1e-4
        assert (response[:, :, TEXT:].norm(dim=-1) > 1e-4).float().mean() > 0.1, "many look at this word"


@pytest.mark.parametrize("top_p", [0.3, 1.0])
def test_a_masked_text_token_has_no_influence(svg2, padded, monkeypatch, top_p):
    for before, after, *_ in perturb_text(svg2, padded, monkeypatch, token=KEPT, top_p=top_p):
        assert torch.equal(before, after)


def test_text_queries_are_exact_however_sparse_the_video_is(svg2, padded, monkeypatch):
    for before, _, dense, _ in perturb_text(svg2, padded, monkeypatch, token=0, top_p=0.1, compensation="off"):
        assert rel_l2(before[:, :, :TEXT], dense[:, :, :TEXT]) <= 1e-5
        assert rel_l2(before[:, :, TEXT:], dense[:, :, TEXT:]) > 1e-2


def test_a_padded_prompt_is_as_sparse_as_a_full_one(svg2, padded):
    variant, model = padded
    patched, stats = svg2(model, top_p=0.3, **EVERYWHERE)
    tiny_models.sample(variant, patched)
    assert stats.latest().dense_calls == {} and stats.latest().density < 0.3


@pytest.mark.parametrize("what", ["video keys", "per query", "per head", "bool over video"])
def test_any_other_mask_is_dense(svg2, padded, what):
    """Another node's patch may bring a mask of its own."""
    variant, model = padded
    tokens = variant.tokens
    masks = {
        "video keys": torch.zeros(1, 1, tokens).index_fill(2, torch.tensor([TEXT + 5]), -1e4),
        "per query": torch.zeros(1, tokens, tokens),
        "per head": torch.zeros(1, 2, 1, tokens),
        "bool over video": torch.ones(1, 1, tokens, dtype=torch.bool).index_fill(2, torch.tensor([TEXT + 5]), False),
    }

    def with_mask(model):
        model = model.clone()
        model.set_model_attn1_patch(lambda q, k, v, pe, attn_mask, extra_options: {"q": q, "k": k, "v": v, "attn_mask": masks[what]})
        return model

    dense = tiny_models.sample(variant, with_mask(model))
    patched, stats = svg2(model, top_p=0.3, **EVERYWHERE)
    assert torch.equal(tiny_models.sample(variant, with_mask(patched)), dense)
    assert set(stats.latest().dense_calls) == {"unsupported_mask"}
