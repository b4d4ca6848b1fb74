"""SVG2FusedOps in the real host: what it replaces computes what the model computes, and goes when the clone goes."""

import contextlib
import functools
from functools import partial

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.metrics import rel_l2

VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
WAN, HUNYUAN, COSMOS, PREDICT2, LTX = "wan2.1 t2v", "hunyuan_video t2v", "cosmos t2v", "cosmos predict2 v2w", "ltxv t2v"
NORM, MODULATION, ROTARY = "norm", "norm + modulation", "norm + rotary embedding"
KEY = "svg2_fused_ops"

# What runs in the kernels in one evaluation of each model; one of each family, and those whose blocks differ.
EXPECTED = {
    "wan2.1 t2v": {NORM: 10, MODULATION: 6, ROTARY: 6},
    "wan2.1 vace": {NORM: 19, MODULATION: 12, ROTARY: 12},
    "wan2.2 5b i2v": {NORM: 10, MODULATION: 6, ROTARY: 6},  # a modulation for each token
    "wan2.2 s2v": {NORM: 22, MODULATION: 6, ROTARY: 6},
    "hunyuan_video t2v padded": {NORM: 5, MODULATION: 10, ROTARY: 12},
    "hunyuan_video i2v token replace": {NORM: 15, ROTARY: 12},  # a modulation for each part of the video
    "hunyuan_video 1.5 t2v": {NORM: 5, MODULATION: 12, ROTARY: 12},
    "cosmos t2v": {NORM: 8, MODULATION: 9, ROTARY: 6},
    "cosmos predict2 v2w": {NORM: 8, MODULATION: 9},
    "ltxv t2v": {NORM: 7, ROTARY: 6},
    "ltxav t2v": {NORM: 14, ROTARY: 24},
    "kandinsky5 lite t2v": {NORM: 9, MODULATION: 13, ROTARY: 10},
    "cogvideox t2v": {NORM: 8, MODULATION: 12},
    "mochi t2v": {NORM: 13},
    "minimax t2v": {NORM: 18},
}


@pytest.fixture(scope="module")
def model(host):
    """`model(name)`: the tiny model of that name, its weights exact in half precision. Patch clones, not it."""

    @torch.no_grad()
    def build(name):
        patcher = VARIANTS[name].build()
        for p in patcher.model.parameters():
            p.copy_(p.to(torch.bfloat16).to(torch.float16))
        return patcher

    return functools.cache(build)


@pytest.fixture
def fused(host):
    """`fused(model, **inputs)` runs the node as ComfyUI does, with everything unless told. -> (model, report)"""
    from svg2_pack.nodes.fused_ops import SVG2FusedOps

    return lambda model, **inputs: SVG2FusedOps.execute(model, **{"ops": "all", **inputs}).result


def sample(name, model, steps=1, **kwargs):
    return tiny_models.sample(VARIANTS[name], model, steps=steps, **kwargs)


def small(name):
    """An empty latent of 72 tokens."""
    channels, side = VARIANTS[name].latent().shape[1], 6 if name == LTX else 12
    return {"shape": torch.zeros(1, channels, 2, side, side), "noise_mask": None}


def calls(model) -> dict[str, int]:
    """How often each kind ran in the kernels since this was asked last."""
    counter = model.attachments[KEY].calls
    seen = dict(counter)
    counter.clear()
    return seen


def in_dtype(model, dtype):
    model = model.clone()
    model.set_model_compute_dtype(dtype)
    return model


def views(model) -> list[str]:
    """Names of what the node has put into the model and not taken out."""
    return [name for name, m in model.model.named_modules() if any(c.__name__ == "View" for c in type(m).__mro__)]


@contextlib.contextmanager
def untouched(model):
    """The model's modules are the same objects with the same attributes as before."""

    def state():
        return {n: (id(m), type(m), sorted(m.__dict__)) for n, m in model.model.named_modules()}

    import comfy.model_management as mm

    mm.unload_all_models()
    before = state()
    yield
    mm.unload_all_models()
    assert state() == before


# The result is the model's


@pytest.mark.parametrize("name", EXPECTED)
def test_what_runs(model, fused, name):
    """fp32: rounding is all that differs; and each operation that the model has runs in the kernels."""
    own = sample(name, model(name))
    patched, report = fused(model(name))
    with untouched(patched):
        result = sample(name, patched)
        assert views(patched)
    assert calls(patched) == EXPECTED[name]
    assert rel_l2(result, own) <= 1e-5
    assert "Not measured on a GPU yet" in report and "backend torch" in report


# One of each way of its blocks: modulation and rotary embedding, a modulation for each part, none of the two, norms alone.
HALF = [(name, torch.bfloat16) for name in ("wan2.2 s2v", "hunyuan_video i2v token replace", "cogvideox t2v", "minimax t2v", LTX)]
HALF += [(name, torch.float16) for name in (WAN, COSMOS, PREDICT2, "hunyuan_video t2v padded", "kandinsky5 lite t2v")]


@pytest.mark.parametrize("name, dtype", HALF)
def test_no_less_exact_than_the_models_own(model, fused, name, dtype):
    """One evaluation in half precision against one of the same weights in fp32: the error is at most twice the model's own."""
    truth = sample(name, in_dtype(model(name), torch.float32))
    own = sample(name, in_dtype(model(name), dtype))
    patched, report = fused(in_dtype(model(name), dtype))
    result = sample(name, patched)
    assert str(dtype).removeprefix("torch.") in report
    assert set(calls(patched)) == set(EXPECTED[name])
    assert rel_l2(own, truth) > 0 and rel_l2(result, truth) <= 2 * rel_l2(own, truth)


@pytest.mark.parametrize("name", [HUNYUAN, LTX])
def test_triton(model, fused, name):
    """The kernels: natively on a GPU, in Triton's interpreter without one."""
    pytest.importorskip("triton", reason="Triton has no build for this system")
    own = sample(name, model(name), **small(name))
    patched, report = fused(model(name), backend="triton")
    assert rel_l2(sample(name, patched, **small(name)), own) <= 1e-5
    assert calls(patched) == EXPECTED.get(name, EXPECTED["hunyuan_video t2v padded"])
    assert "backend triton" in report


# The patch and its removal


@pytest.mark.parametrize("name", [HUNYUAN, COSMOS])
def test_the_model_is_as_it_was_afterwards(model, fused, name):
    """Unpatched, patched and unpatched again, without unloading in between."""
    sample(name, model(name))  # the host leaves marks of its own at a first load
    with untouched(model(name)):
        before = sample(name, model(name))
        patched, _ = fused(model(name))
        assert views(model(name)) == [], "the node itself touches nothing"
        sample(name, patched)
        assert calls(patched)
        assert torch.equal(sample(name, model(name)), before)
        assert views(model(name)) == [] and calls(patched) == {}
        sample(name, patched)
        assert calls(patched)


def test_the_node_twice(model, fused):
    patched, _ = fused(fused(model(WAN))[0])
    sample(WAN, patched)
    assert calls(patched) == EXPECTED[WAN]


def test_on_top_of_a_loaded_patch(model, fused):
    """A clone of a model that is loaded with its views in place."""
    first, report = fused(model(WAN))
    own = sample(WAN, first)
    second, again = fused(first)
    assert again == report
    assert torch.equal(sample(WAN, second), own)
    with untouched(model(WAN)):
        pass
    assert views(model(WAN)) == []


def test_off(model, fused):
    patched, report = fused(model(WAN), enabled=False)
    assert patched is model(WAN) and "off" in report


def test_weights_keep_their_names(model, fused):
    patched, _ = fused(model(HUNYUAN))
    names = list(model(HUNYUAN).model.state_dict())
    sample(HUNYUAN, patched)
    assert views(patched) and list(patched.model.state_dict()) == names


def test_a_copy_of_the_model_has_its_own_weights(fused):
    """What TorchCompileModel makes of a model in dynamic memory, and a multi-GPU split of any."""
    made = VARIANTS[WAN].build()
    made.cached_patcher_init = (lambda **_: VARIANTS[WAN].build(), ())
    patched, _ = fused(made)
    own = sample(WAN, patched)
    copy = patched.clone(force_deepcopy=True)
    assert copy.model is not patched.model
    with torch.no_grad():
        for p in patched.model.parameters():
            p.zero_()
    calls(patched)
    assert torch.equal(sample(WAN, copy), own) and calls(patched) == EXPECTED[WAN]


# What is chosen, and what is said


def test_auto_replaces_nothing_without_a_measurement(model, fused):
    from svg2_pack.svg2_core.ops.norm_rope import measured

    patched, report = fused(model(WAN), ops="auto")
    assert measured.FASTER == {}, "then test_auto_follows_the_measurements is what says what auto does"
    assert patched is model(WAN)
    assert "Nothing was replaced" in report
    assert all(f"{kind}: not measured to be faster" in report for kind in measured.KINDS)


def test_auto_follows_the_measurements(model, fused, monkeypatch):
    from svg2_pack.svg2_core.ops.norm_rope import measured

    monkeypatch.setattr(measured, "record", lambda device, kind: "results/fused.csv" if kind == MODULATION else None)
    patched, report = fused(model(WAN), ops="auto")
    sample(WAN, patched)
    assert calls(patched) == {MODULATION: 6}
    assert "Measured: results/fused.csv" in report and "Not measured on a GPU yet" not in report


def test_the_report(model, fused):
    _, report = fused(model(WAN))
    lines = report.splitlines()
    assert lines[0] == "SVG2 Fused Ops on WanModel, cpu, float32, ops all"
    for line in (
        "3 x WanAttentionBlock: norm + modulation",
        "3 x WanSelfAttention: norm + rotary embedding",
        "6 x RMSNorm over 256",
    ):
        assert f"  {line}" in lines
    assert lines[-1].startswith("ComfyUI's own rotary kernels: comfy_kitchen, ")
    _, report = fused(model(PREDICT2))
    assert "3 x Attention: norm + rotary embedding: ComfyUI itself calls comfy_kitchen.rms_rope_split_half" in report
    _, report = fused(model("mochi t2v"))
    assert "its blocks are not among those" in report


def test_the_schema_is_what_execute_takes(host):
    import inspect

    from svg2_pack.nodes.fused_ops import SVG2FusedOps

    schema = SVG2FusedOps.define_schema()
    schema.validate()
    assert (schema.node_id, schema.display_name, schema.category) == (
        "SVG2FusedOps",
        "SVG2 Fused Ops",
        "model/patch/svg2",
    )
    defaults = {name: p.default for name, p in inspect.signature(SVG2FusedOps.execute).parameters.items()}
    assert list(defaults) == [i.id for i in schema.inputs]
    assert all(i.optional and i.default == defaults[i.id] for i in schema.inputs[1:])


@pytest.mark.parametrize("inputs", [{"ops": "most"}, {"backend": "cuda"}])
def test_bad_input_is_named(model, fused, inputs):
    with pytest.raises(ValueError, match=f"{next(iter(inputs))}: "):
        fused(model(WAN), **inputs)


def test_a_dtype_that_kernels_do_not_have(model, fused):
    patched, report = fused(in_dtype(model(WAN), torch.float64))
    assert "float64 is not" in report and "Nothing was replaced" in report and KEY not in patched.attachments


def other_forward(whole):
    """What another node, or the next version of the host, may make of a method."""

    def forward(self, *args, **kwargs):
        return 0.9 * whole(self, *args, **kwargs)

    return forward


@pytest.mark.parametrize(
    ("name", "method", "says", "runs"),
    [
        (WAN, "comfy.ldm.wan.model.WanSelfAttention.forward", "3 x WanSelfAttention", {MODULATION: 6, NORM: 16}),
        (WAN, "comfy.ldm.wan.model.WanAttentionBlock.forward", "3 x WanAttentionBlock", {ROTARY: 6, NORM: 16}),
        (
            HUNYUAN,
            "comfy.ldm.flux.layers.DoubleStreamBlock.forward",
            "2 x DoubleStreamBlock",
            {MODULATION: 2, ROTARY: 4, NORM: 21},
        ),
        (COSMOS, "comfy.ldm.cosmos.blocks.Attention.cal_qkv", "3 x Attention", {MODULATION: 9, NORM: 14}),
    ],
)
def test_another_source_runs_as_it_is(model, fused, monkeypatch, name, method, says, runs):
    from svg2_pack.nodes.fused.sites import find

    cls, _, attribute = method.rpartition(".")
    whole = getattr(find(cls), attribute)
    result = (
        (lambda *a, **k: tuple(0.9 * x for x in whole(*a, **k))) if name in (HUNYUAN, COSMOS) else other_forward(whole)
    )
    before = sample(name, model(name))
    monkeypatch.setattr(find(cls), attribute, result)
    own = sample(name, model(name))
    assert rel_l2(own, before) > 1e-2
    patched, report = fused(model(name))
    assert rel_l2(sample(name, patched), own) <= 1e-5
    assert (
        f"{says}: " in report and f"its {attribute} is not the one of ComfyUI 0.30 that this was written for" in report
    )
    assert calls(patched) == runs


def test_another_helper_is_another_source(model, fused, monkeypatch):
    """What a recognised block relies on, too."""
    import comfy.ldm.wan.model as wan

    whole = wan.repeat_e
    monkeypatch.setattr(wan, "repeat_e", lambda e, x: 0.9 * whole(e, x))
    own = sample(WAN, model(WAN))
    patched, report = fused(model(WAN))
    assert rel_l2(sample(WAN, patched), own) <= 1e-5
    assert "3 x WanAttentionBlock: norm + modulation: its forward is not" in report


def newer_modulation(x):
    """Stands where newer hosts' blocks have a function for it."""
    import comfy.quant_ops

    return comfy.quant_ops.ck.adaln(x, torch.zeros_like(x), torch.zeros_like(x))


def test_a_newer_hosts_own_modulation_is_told(model, fused, monkeypatch):
    """By what its block calls, by way of a function of its module."""
    import comfy.ldm.wan.model as wan

    whole = wan.WanAttentionBlock.forward

    def forward(self, x, **kwargs):
        return whole(self, newer_modulation(x), **kwargs)

    monkeypatch.setattr(wan.WanAttentionBlock, "forward", forward)
    own = sample(WAN, model(WAN))
    patched, report = fused(model(WAN))
    assert rel_l2(sample(WAN, patched), own) <= 1e-5
    assert (
        "3 x WanAttentionBlock: norm + modulation: its forward is not the one of ComfyUI 0.30 that this was written for, "
        "and itself calls comfy_kitchen.adaln for the modulation\n" in report
    )
    assert "3 x WanSelfAttention: norm + rotary embedding" in report


def test_an_older_host_without_a_kernel_of_its_own(model, fused, monkeypatch):
    """Cosmos-Predict2 before 0.30: its queries' and keys' norms stand alone, and are taken."""
    import comfy.ldm.cosmos.predict2 as predict2
    import comfy.quant_ops

    def compute_qkv(self, x, context=None, rope_emb=None, transformer_options=None):
        context = x if context is None else context
        q, k, v = (
            linear(given).unflatten(-1, (self.n_heads, self.head_dim))
            for linear, given in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        if self.is_selfattn and rope_emb is not None:
            q, k = comfy.quant_ops.ck.apply_rope_split_half(q, k, rope_emb)
        return q, k, v

    own = sample(PREDICT2, model(PREDICT2))
    monkeypatch.setattr(predict2.Attention, "compute_qkv", compute_qkv)
    patched, report = fused(model(PREDICT2))
    assert rel_l2(sample(PREDICT2, patched), own) <= 1e-5
    assert "ComfyUI itself calls" not in report
    assert calls(patched) == {**EXPECTED[PREDICT2], NORM: EXPECTED[PREDICT2][NORM] + 3 * 2}


def test_norms_that_are_left_alone(host, monkeypatch):
    """What computes something else, whoever made it so, and shapes that kernels do not have."""
    import comfy.ops
    from svg2_pack.nodes.fused.install import norm_refused

    class Other(torch.nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    own = comfy.ops.disable_weight_init.RMSNorm
    assert norm_refused(torch.nn.LayerNorm(8)) is norm_refused(own(8)) is None
    assert norm_refused(Other(8)) == "Other is not a norm that this was written for"
    assert norm_refused(torch.nn.LayerNorm((3, 8))) == "a norm over [3, 8]"
    replaced = own(8)
    replaced.forward = lambda x: x
    assert norm_refused(replaced) == "another node replaced its forward"
    monkeypatch.setattr(own, "forward", other_forward(own.forward))
    assert norm_refused(own(8)) == "its forward is not the one of ComfyUI 0.30 that this was written for"


def test_where_a_gradient_is_wanted_the_model_has_its_own(host):
    from svg2_pack.nodes.fused.norms import Fused

    fused, norm, x = Fused("torch"), torch.nn.RMSNorm(8), torch.randn(2, 8)
    with torch.enable_grad():
        assert fused.norm(norm, x) is None, "of its weight"
        norm.weight.requires_grad_(False)
        assert fused.norm(norm, x) is not None and fused.norm(norm, x.requires_grad_()) is None
    with torch.no_grad():
        assert torch.allclose(fused.norm(norm, x), norm(x))


# Other nodes' patches


@pytest.mark.parametrize(
    "path, order",
    [("blocks.1.self_attn.forward", "before"), ("blocks.1.self_attn.forward", "after"), ("blocks.1.forward", "after"),
     ("blocks.1.norm3", "before"), ("blocks.1", "after")],
)  # fmt: skip
def test_another_nodes_object_patch_stays(model, fused, path, order):
    """Whatever it replaces: a forward, as many nodes do, a norm that stands alone, or a whole block."""

    def node(patcher):
        patcher = patcher.clone()
        whole = patcher.get_model_object(f"diffusion_model.{path}")
        if path.endswith("forward"):
            new = lambda x, *args, **kwargs: 0.9 * whole(x, *args, **kwargs)  # noqa: E731
        else:
            new = Weaker(whole)
        patcher.add_object_patch(f"diffusion_model.{path}", new)
        return patcher

    own = sample(WAN, node(model(WAN)))
    assert rel_l2(own, sample(WAN, model(WAN))) > 1e-3
    patched, report = fused(node(model(WAN))) if order == "before" else (node(fused(model(WAN))[0]), None)
    with untouched(model(WAN)):
        assert rel_l2(sample(WAN, patched), own) <= 1e-5
        assert calls(patched)
    if report is not None:
        assert "another node replaced it" in report
    # When it is gone, so is its reason; the host leaves the forward that was there on the module itself.
    patched, report = fused(model(WAN))
    assert "another node" not in report
    with untouched(model(WAN)):
        sample(WAN, patched)
    assert calls(patched) == EXPECTED[WAN]


class Weaker(torch.nn.Module):
    """Another node's stand-in for a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = [inner]

    def forward(self, x, *args, **kwargs):
        return 0.9 * self.inner[0](x, *args, **kwargs)


def test_a_patch_of_queries_sees_tensors(model, fused):
    """Between norm and rotary embedding."""

    def scale(q, k, v, pe, attn_mask, extra_options):
        return {"q": q * 1.3, "k": k.flip(-1)}

    def node(patcher):
        patcher = patcher.clone()
        patcher.set_model_patch(scale, "attn1_patch")
        return patcher

    own = sample(HUNYUAN, node(model(HUNYUAN)))
    assert rel_l2(own, sample(HUNYUAN, model(HUNYUAN))) > 1e-2
    patched = node(fused(model(HUNYUAN))[0])
    assert rel_l2(sample(HUNYUAN, patched), own) <= 1e-5
    assert calls(patched) == {MODULATION: 10, NORM: 5 + 12}


@pytest.mark.parametrize("name, order", [(WAN, "before"), (HUNYUAN, "after"), (COSMOS, "before"), (LTX, "after")])
def test_with_sparse_attention(model, fused, svg2, name, order):
    everywhere = {"top_p": 1.0, "warmup_steps": 0, "dense_blocks": "", "q_clusters": 8, "k_clusters": 12}
    own = sample(name, model(name))
    if order == "before":
        patched, stats = svg2(fused(model(name))[0], **everywhere)
    else:
        patched, stats = svg2(model(name), **everywhere)
        patched, _ = fused(patched)
    assert rel_l2(sample(name, patched), own) <= 1e-4
    assert stats.latest().sparse_calls == VARIANTS[name].blocks and stats.latest().dense_calls == {}
    assert calls(patched)


# Weights: LoRA, offloading, fp8


@pytest.mark.parametrize("name, order", [(WAN, "after"), (HUNYUAN, "before"), (COSMOS, "after")])
def test_lora_and_offloading(model, fused, room, with_lora, name, order):
    """Of the norms as well as of the matrices."""
    own = sample(name, with_lora(model(name), 1, 2))
    assert rel_l2(own, sample(name, model(name))) > 1e-2
    patched = fused(with_lora(model(name), 1, 2))[0] if order == "before" else with_lora(fused(model(name))[0], 1, 2)
    full = sample(name, patched)
    ran = calls(patched)
    assert rel_l2(full, own) <= 1e-5
    for memory in (0.1, patched.model_size() / 2):
        room(memory)
        assert torch.equal(sample(name, patched), full)
        assert patched.model.model_lowvram and patched.lowvram_patch_counter() > 0
        assert calls(patched) == ran and ran
    assert torch.equal(sample(name, with_lora(model(name), 1, 2)), own)


def test_lora_of_one_prompt(model, fused):
    """Hooks: the host changes the weights between the conditionings of a step."""
    import comfy.hooks

    g, weights = torch.Generator().manual_seed(6), {}
    for key, p in model(WAN).model.state_dict().items():
        if "attn" in key and p.dim() == 2:
            key = key.removesuffix(".weight")
            weights[f"{key}.lora_up.weight"] = torch.randn(p.shape[0], 4, generator=g)
            weights[f"{key}.lora_down.weight"] = torch.randn(4, p.shape[1], generator=g) * 0.2 * p.shape[1] ** -0.5
    hooks = comfy.hooks.create_hook_lora(weights, 1.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(VARIANTS[WAN].conditioning(), hooks)
    run = partial(sample, WAN, positive=positive, cfg=4.0)
    own = run(model(WAN))
    assert rel_l2(own, sample(WAN, model(WAN), cfg=4.0)) > 1e-2
    patched, _ = fused(model(WAN))
    assert rel_l2(run(patched), own) <= 1e-5 and calls(patched)


def _scaled(weights):
    """The blocks' matrices in fp8, with the scale of each."""
    others = dict(weights)
    for key in [k for k, w in weights.items() if k.endswith(".weight") and w.dim() == 2 and "blocks" in k]:
        weight = others.pop(key)
        scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
        others |= {key: (weight / scale).to(torch.float8_e4m3fn), key.removesuffix("weight") + "scale_weight": scale}
    return {**others, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}


@pytest.mark.parametrize("name, scaled", [(WAN, True), (HUNYUAN, False)], ids=["scaled matrices", "all weights fp8"])
def test_fp8_weights(model, fused, name, scaled):
    import comfy.sd

    weights = dict(model(name).model.diffusion_model.state_dict())
    weights = _scaled(weights) if scaled else weights
    options = {} if scaled else {"dtype": torch.float8_e4m3fn}
    loaded = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)
    truth, own = (sample(name, in_dtype(loaded, dtype)) for dtype in (torch.float32, torch.bfloat16))
    patched, _ = fused(in_dtype(loaded, torch.bfloat16))
    assert rel_l2(sample(name, patched), truth) <= 2 * rel_l2(own, truth)
    assert {MODULATION, ROTARY} <= set(calls(patched))


# torch.compile


@pytest.fixture
def compiled(monkeypatch):
    """`compiled(model, keys)`: as TorchCompileModel compiles, less the code generator, with attention that is traced."""
    import comfy.ldm.wan.model
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    monkeypatch.setattr(comfy.ldm.wan.model, "optimized_attention", attention_pytorch)

    def compile_(model, keys):
        model = model.clone(disable_dynamic=True)
        set_torch_compile_wrapper(
            model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict}, keys=keys
        )
        return model

    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield compile_
    torch._dynamo.reset()


BLOCKS = [f"diffusion_model.blocks.{i}" for i in range(3)]


@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_torch_compile(model, fused, compiled, whole, name=WAN):
    """What is compiled is the model's own code, which the compiler fuses; the rest goes on in the kernels."""
    own = sample(name, model(name), **small(name))
    patched, _ = fused(model(name))
    result = sample(name, compiled(patched, [] if whole else BLOCKS), **small(name))
    assert rel_l2(result, own) <= 1e-5
    ran = calls(patched)
    assert (ran == {}) if whole else (0 < ran[NORM] < EXPECTED[name][NORM] and MODULATION not in ran)
    # Not compiled, the same modules run in the kernels again.
    assert rel_l2(sample(name, patched, **small(name)), own) <= 1e-5
    assert calls(patched) == EXPECTED[name]


# Failures


@pytest.mark.parametrize("operation", ["rms_norm", "layer_norm", "rms_norm_rotary"])
def test_a_kernel_that_fails_is_retired(model, fused, monkeypatch, operation):
    """That call and the later ones are the model's own."""
    pytest.importorskip("triton", reason="Triton has no build for this system")
    from svg2_pack.nodes.fused import norms as fused_norms
    from svg2_pack.svg2_core.ops import registry
    from svg2_pack.svg2_core.ops.norm_rope import support

    def fails(*args, **kwargs):
        raise RuntimeError("an illegal instruction was encountered")

    own = sample(WAN, model(WAN), **small(WAN))
    patched, _ = fused(model(WAN), backend="triton")
    monkeypatch.setattr(fused_norms, operation, fails)
    try:
        assert rel_l2(sample(WAN, patched, **small(WAN)), own) <= 1e-5
        assert "illegal instruction" in registry.retired(support.KEY)
        calls(patched)
        sample(WAN, patched, **small(WAN))
        assert calls(patched) == {}
        again, report = fused(model(WAN), backend="triton")
        assert again is model(WAN) and "illegal instruction" in report
    finally:
        registry.reinstate(support.KEY)


def test_a_wrong_kernel_is_found_by_the_self_test(model, fused, monkeypatch):
    pytest.importorskip("triton", reason="Triton has no build for this system")
    from svg2_pack.svg2_core.ops import registry
    from svg2_pack.svg2_core.ops.norm_rope import support
    from svg2_pack.svg2_core.ops.norm_rope import triton as kernels

    whole = kernels.norm
    monkeypatch.setattr(kernels, "norm", lambda x, weight, bias, eps, *rest: whole(x, weight, bias, 0.1 + eps, *rest))
    monkeypatch.setattr(support, "_tested", set())
    try:
        patched, report = fused(model(WAN), backend="triton")
        assert patched is model(WAN) and "layer_norm: relative error" in report
    finally:
        registry.reinstate(support.KEY)


def test_out_of_memory_is_the_hosts_business(model, fused, monkeypatch):
    """The model's own code would need more of it."""
    from svg2_pack.nodes.fused import norms as fused_norms

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    patched, _ = fused(model(WAN))
    monkeypatch.setattr(fused_norms, "rms_norm_rotary", full)
    with pytest.raises(torch.OutOfMemoryError):
        sample(WAN, patched)
    monkeypatch.undo()
    with untouched(model(WAN)):
        assert rel_l2(sample(WAN, patched), sample(WAN, model(WAN))) <= 1e-5
