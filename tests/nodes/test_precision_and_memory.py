"""Every precision a model is loaded in, weights and conditionings that do not fit: the sample stays right."""

import json
from functools import partial

import pytest
import tiny_models
import tiny_wan
import torch
from svg2_pack.svg2_core.metrics import rel_l2

VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
EVERYWHERE = {"top_p": 1.0, "warmup_steps": 0, "dense_blocks": ""}
SPARSE = {**EVERYWHERE, "top_p": 0.3, "warmup_steps": 1}


# How users have their models: the host's loader options, or what is in the file. All give a state dict and options.


def matrices(weights) -> list[str]:
    """Names of the weights of the blocks' linear layers."""
    return [k for k, w in weights.items() if k.endswith(".weight") and w.dim() == 2 and "blocks" in k]


def in_dtype(dtype, weights):
    return weights, {"dtype": dtype}


def _fp8(weights):
    """The blocks' matrices in fp8, with the scale of each. -> (all other weights, {layer: (fp8 weight, scale)})"""
    others, layers = dict(weights), {}
    for key in matrices(weights):
        weight = others.pop(key)
        scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
        layers[key.removesuffix(".weight")] = (weight / scale).to(torch.float8_e4m3fn), scale
    return others, layers


def scaled_fp8(weights):
    """The older form of such files."""
    others, layers = _fp8(weights)
    for name, (weight, scale) in layers.items():
        others |= {f"{name}.weight": weight, f"{name}.scale_weight": scale}
    return {**others, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {}


def comfy_quant(weights):
    """The newer form, a note beside each layer."""
    others, layers = _fp8(weights)
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for name, (weight, scale) in layers.items():
        others |= {f"{name}.weight": weight, f"{name}.weight_scale": scale, f"{name}.comfy_quant": note.clone()}
    return others, {}


fp32, fp16, bf16 = (partial(in_dtype, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
fp8 = partial(in_dtype, torch.float8_e4m3fn)
PRECISIONS = {
    "fp32": (fp32, torch.float32),
    "fp16": (fp16, torch.float16),
    "bf16": (bf16, torch.bfloat16),
    "fp16 computed in fp32": (fp16, torch.float32),
    "fp8 computed in bf16": (fp8, torch.bfloat16),
    "scaled fp8 computed in bf16": (scaled_fp8, torch.bfloat16),
    "comfy_quant fp8 computed in fp16": (comfy_quant, torch.float16),
}


def load(network, precision: str):
    import comfy.sd

    form, compute = PRECISIONS[precision]
    weights, options = form(dict(network.state_dict()))
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options).clone()
    model.set_model_compute_dtype(compute)  # as the host's node ModelComputeDtype does; a CPU's own choice is fp32
    return model


def exact_attention(func, q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """Another node's override: attention in fp64, rounded once."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(q.double(), k.double(), v.double(), attn_mask=mask).to(q.dtype)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def exact(model):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = exact_attention
    return model


# Every precision, and in those that kernels compute in, text in the sequence, too.
OF_MODELS = [(precision, "wan2.1 t2v") for precision in PRECISIONS]
OF_MODELS += [("fp16", "hunyuan_video t2v"), ("bf16", "hunyuan_video 1.5 t2v padded")]


@pytest.mark.parametrize("precision, name", OF_MODELS)
def test_no_less_exact_than_the_hosts_own_attention(model, svg2, monkeypatch, name, precision):
    """Everything selected: the sample's distance from one with exact attention, against the dense sample's."""
    from svg2_pack.svg2_core import session

    def noted(q, *args, **kwargs):
        seen.add(q.dtype)
        return whole(q, *args, **kwargs)

    seen, whole = set(), session.svg2_attention
    monkeypatch.setattr(session, "svg2_attention", noted)
    network, blocks = model(name).model.diffusion_model, VARIANTS[name].blocks
    loaded = load(network, precision)
    sample = partial(tiny_models.sample, VARIANTS[name], shape=VARIANTS[name].latent()[:, :, :3, :12, :12])
    quantized = {k for k, p in loaded.model.diffusion_model.named_parameters() if type(p).__name__ == "QuantizedTensor"}
    assert bool(quantized) == precision.startswith(("scaled", "comfy")), "the host must have taken the weights as given"

    truth, dense = (sample(m) for m in (exact(loaded), loaded))
    patched, stats = svg2(loaded, **EVERYWHERE)
    sparse = sample(patched)
    assert stats.latest().sparse_calls == 2 * blocks and stats.latest().dense_calls == {}
    assert seen == {PRECISIONS[precision][1]}
    assert sparse.isfinite().all()
    assert rel_l2(sparse, truth) <= 2 * rel_l2(dense, truth)

    patched, stats = svg2(loaded, **{**EVERYWHERE, "top_p": 0.5}, compensation="centroid")
    assert rel_l2(sample(patched), truth) < 0.5 and stats.latest().density < 0.8


# Weights that do not fit: the host leaves some where they are and casts and patches them as they are used.


@pytest.mark.parametrize("name", ["wan2.1 t2v", "hunyuan_video t2v", "cosmos t2v"])
def test_offloaded_weights(model, svg2, room, with_lora, name):
    variant = VARIANTS[name]
    loaded = with_lora(model(name), 2)
    patched, stats = svg2(loaded, **SPARSE)
    full = tiny_models.sample(variant, patched)
    assert loaded.model.model_lowvram is False and rel_l2(full, tiny_models.sample(variant, model(name))) > 1e-2
    for memory in (0.1, loaded.model_size() / 2):
        room(memory)
        assert torch.equal(tiny_models.sample(variant, patched), full)
        assert loaded.model.model_lowvram and loaded.lowvram_patch_counter() > 0
        assert (loaded.loaded_size() > 0) == (memory > 1)
        assert stats.latest().sparse_calls == variant.blocks
        assert stats.latest().dense_calls == {"warmup": variant.blocks}


def test_weights_that_are_pushed_out_between_runs(wan, svg2, room, with_lora):
    import comfy.model_management as mm

    model = with_lora(wan, 2)
    patched, _ = svg2(model, **SPARSE)
    room(1e32)
    full = tiny_wan.sample(patched)
    [loaded] = [m for m in mm.current_loaded_models if m.model is not None and m.model.is_clone(model)]
    assert not model.model.model_lowvram
    assert loaded.model.partially_unload(loaded.model.offload_device, model.model_size() / 2) > 0
    room(0.1, unload=False)
    assert torch.equal(tiny_wan.sample(patched), full)
    assert model.model.model_lowvram and model.loaded_size() > 0


# Conditionings that do not fit together: the host asks for each on its own.


def test_regional_prompts_together_or_one_by_one(wan, svg2, monkeypatch):
    """The host makes a negative for the region as well, under the very uuid of the region's positive."""
    region = tiny_wan.conditioning(seed=2)
    region[0][1].update({"area": (5, 8, 16, 0, 8, 0), "strength": 1.0, "set_area_to_bounds": False})
    inputs = {"positive": tiny_wan.conditioning(seed=1) + region, "cfg": 3.0}
    patched, stats = svg2(wan, **SPARSE)
    together = tiny_wan.sample(patched, **inputs)
    calls = stats.latest().sparse_calls
    monkeypatch.setattr(wan.model, "memory_required", lambda *args, **kwargs: float("inf"))
    one_by_one = tiny_wan.sample(patched, **inputs)
    assert stats.latest().sparse_calls == 4 * 3 * 3 == 2 * calls
    assert rel_l2(one_by_one, together) <= 1e-3 < rel_l2(together, tiny_wan.sample(wan, **inputs))
