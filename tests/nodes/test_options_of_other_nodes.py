"""Other nodes evaluate the model themselves, copy its options, or train it."""

import copy

import pytest
import torch
from svg2_pack.svg2_core.metrics import rel_l2
from tiny_wan import sample

EVERYWHERE = {"warmup_steps": 0, "dense_blocks": "", "top_p": 1.0}


def extra_evaluation(model):
    """A guidance of its own: the model once more, with another text, and options without sigmas and conditionings."""
    model = model.clone()
    context = torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(3))

    def post(args):
        options = dict(args["model_options"]["transformer_options"])
        context_of = context.expand(len(args["input"]), -1, -1)
        other = args["model"].apply_model(args["input"], args["sigma"], c_crossattn=context_of, transformer_options=options)
        return args["denoised"] + 0.1 * (args["denoised"] - other)

    model.set_model_sampler_post_cfg_function(post)
    return model


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_evaluation_without_sigmas(wan, svg2, order):
    """It belongs to the step in which it is made, and runs sparse as the others do."""
    dense = sample(extra_evaluation(wan), steps=3)
    assert rel_l2(dense, sample(wan, steps=3)) > 1e-3
    for inputs, sparse, reasons in ((EVERYWHERE, 18, {}), ({**EVERYWHERE, "warmup_steps": 1}, 12, {"warmup": 6})):
        patched, stats = svg2(extra_evaluation(wan) if order == "before" else wan, **inputs)
        assert rel_l2(sample(patched if order == "before" else extra_evaluation(patched), steps=3), dense) <= 1e-4
        report = stats.latest()
        assert report.sparse_calls == sparse and report.dense_calls == reasons


def copied_for_the_model(model):
    model = model.clone()

    def wrapper(apply, args):
        c = dict(args["c"], transformer_options=copy.deepcopy(args["c"]["transformer_options"]))
        return apply(args["input"], args["timestep"], **c)

    model.set_model_unet_function_wrapper(wrapper)
    return model


def copied_for_each_step(model):
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper(WrappersMP.PREDICT_NOISE, lambda executor, x, t, options, seed: executor(x, t, copy.deepcopy(options), seed))
    return model


def copied_before(model):
    model = model.clone()
    model.model_options = copy.deepcopy(model.model_options)
    return model


@pytest.mark.parametrize("other", [copied_for_the_model, copied_for_each_step, copied_before])
def test_options_that_are_copied_deeply(wan, svg2, other):
    patched, stats = svg2(wan, warmup_steps=1, dense_blocks="")
    expected = sample(patched)
    assert torch.equal(sample(other(patched)), expected)
    assert stats.latest().sparse_calls == 9 and stats.latest().dense_calls == {"warmup": 3}


def test_training_runs_dense_and_gets_its_gradients(wan, svg2, monkeypatch):
    """Gradients of the latent, through an evaluation inside a run, equal those without SVG2."""
    import comfy.ldm.flux.math
    import comfy.ldm.wan.model

    # The host's own operation has no formula for gradients.
    monkeypatch.setattr(comfy.ldm.wan.model, "apply_rope1", comfy.ldm.flux.math._apply_rope1)
    found = {}

    def training(name, model):
        model = model.clone()

        def post(args):
            x = args["input"].detach().clone().requires_grad_(True)
            context = torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(3))
            with torch.enable_grad():
                out = args["model"].apply_model(
                    x, args["sigma"], c_crossattn=context, transformer_options=dict(args["model_options"]["transformer_options"])
                )
                found[name] = torch.autograd.grad(out.square().sum(), x)[0]
            return args["denoised"]

        model.set_model_sampler_post_cfg_function(post)
        return model

    sample(training("without", wan), steps=1)
    patched, stats = svg2(wan, warmup_steps=0, dense_blocks="", density=0.1)
    sample(training("with", patched), steps=1)
    report = stats.latest()
    assert report.sparse_calls == 3 and report.dense_calls == {"gradients": 3}
    assert found["with"].norm() > 0 and torch.equal(found["with"], found["without"])
    assert any("gradients" in notice for notice in report.notices)
