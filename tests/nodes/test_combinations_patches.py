"""Other nodes that patch the same model, before SVG2 or after it: the sample equals the dense one with the same nodes.

What another node changes must stay changed (each test asserts that it matters), and what it makes of the token sequence
must be answered rightly, sparse or dense.
"""

import contextlib
import weakref

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.metrics import rel_l2

EVERYWHERE = {"top_p": 1.0, "warmup_steps": 0, "dense_blocks": "", "q_clusters": 8, "k_clusters": 12}
# Few iterations over few tokens: a tie that rounding decides moves a token to another cluster, and then everything.
SPARSE = {**EVERYWHERE, "top_p": 0.3, "kmeans_init_iters": 2, "kmeans_iters": 1}

VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
WAN, HUNYUAN, COSMOS, PREDICT2 = "wan2.1 t2v", "hunyuan_video t2v", "cosmos t2v", "cosmos predict2 v2w"
LTX, MOCHI = "ltxv t2v", "mochi t2v"
ORDERS = ["before", "after"]  # the other node stands before SVG2 in the graph, or after it


def small(name):
    """An empty latent of 72 tokens."""
    channels, side = VARIANTS[name].latent().shape[1], 6 if name == LTX else 12
    return torch.zeros(1, channels, 2, side, side)


def sample(name, model, **kwargs):
    return tiny_models.sample(VARIANTS[name], model, **{"shape": small(name), "noise_mask": None, **kwargs})


@pytest.fixture
def with_both(svg2):
    """`with_both(model, node, order, **inputs)`: a model that went through SVG2 and another node. -> (model, stats)"""

    def patch(model, node, order, **inputs):
        if order == "before":
            return svg2(node(model), **inputs)
        patched, stats = svg2(model, **inputs)
        return node(patched), stats

    return patch


@pytest.fixture
def gpu_attention(monkeypatch):
    """The host's attention of most users. Unlike its CPU default it takes every mask, and is traced in one piece."""
    import comfy.ldm.cosmos.blocks
    import comfy.ldm.flux.math
    import comfy.ldm.genmo.joint_model.asymm_models_joint as mochi
    import comfy.ldm.hunyuan_video.model
    from comfy.ldm.modules.attention import attention_pytorch

    for module in (comfy.ldm.cosmos.blocks, comfy.ldm.flux.math, comfy.ldm.hunyuan_video.model, mochi):
        monkeypatch.setattr(module, "optimized_attention", attention_pytorch)


@pytest.fixture
def agrees(model, with_both):
    """`agrees(name, node, order, **sampling)`: everything selected equals dense with that node. -> the run's report"""

    def check(name, node, order="after", matters=1e-3, **kwargs):
        dense = sample(name, node(model(name)), **kwargs)
        assert dense.isfinite().all()
        assert rel_l2(dense, sample(name, model(name), **kwargs)) > matters, "the other node must matter"
        patched, stats = with_both(model(name), node, order, **EVERYWHERE)
        assert rel_l2(sample(name, patched, **kwargs), dense) <= 1e-4
        report = stats.latest()
        assert report.sparse_calls > 0 and report.completed
        return report

    return check


# Weights and schedules


def lora(model) -> dict:
    """A random LoRA over the attention projections, by the host's generic names."""
    g = torch.Generator().manual_seed(6)
    weights = {}
    for name, p in model.model.state_dict().items():
        if "attn" in name and p.dim() == 2:
            name = name.removesuffix(".weight")
            weights[f"{name}.lora_up.weight"] = torch.randn(p.shape[0], 4, generator=g)
            weights[f"{name}.lora_down.weight"] = torch.randn(4, p.shape[1], generator=g) * 0.2 * p.shape[1] ** -0.5
    return weights


@pytest.mark.parametrize("name, order", [(WAN, "before"), (HUNYUAN, "after"), (COSMOS, "before")])
def test_lora(model, agrees, name, order):
    import comfy.sd

    weights = lora(model(name))
    report = agrees(name, lambda m: comfy.sd.load_lora_for_models(m, None, weights, 1.0, 0)[0], order, matters=1e-2)
    assert report.dense_calls == {} and report.density == 1


@pytest.mark.parametrize("name", [WAN, COSMOS])
def test_lora_of_one_prompt(model, svg2, name):
    """Hooks: the host changes the weights between the conditionings of a step."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora(model(name)), 1.0, 0.0)
    plain = VARIANTS[name].conditioning()
    positive = comfy.hooks.set_hooks_for_conditioning(plain, hooks)
    dense = sample(name, model(name), positive=positive, cfg=4.0)
    assert rel_l2(dense, sample(name, model(name), cfg=4.0)) > 1e-2
    patched, stats = svg2(model(name), **EVERYWHERE)
    assert rel_l2(sample(name, patched, positive=positive, cfg=4.0), dense) <= 1e-4
    assert stats.latest().sparse_calls == 2 * 2 * 3 and stats.latest().dense_calls == {}


def model_sampling(name):
    from comfy_extras import nodes_model_advanced as nodes

    if name == COSMOS:
        return lambda m: nodes.ModelSamplingContinuousEDM().patch(m, "edm", 40.0, 0.01)[0]
    return lambda m: nodes.ModelSamplingSD3().patch(m, 3.0)[0]


@pytest.mark.parametrize("name, order", [(WAN, "after"), (HUNYUAN, "before"), (COSMOS, "after")])
def test_model_sampling(agrees, with_both, model, name, order):
    assert agrees(name, model_sampling(name), order, steps=4, matters=1e-2).dense_calls == {}
    patched, stats = with_both(model(name), model_sampling(name), order, **{**EVERYWHERE, "warmup_steps": 2})
    # From the top of this schedule, even if the noise is already in the latent: a generation, with its warm-up.
    x = torch.randn(small(name).shape, generator=torch.Generator().manual_seed(1))
    for noise in (None, torch.zeros_like(x)):
        sample(name, patched, shape=x, noise=noise, steps=4)
        assert [s.sparse for s in stats.latest().steps] == [False, False, True, True]


GUIDANCE = ["CFGZeroStar", "CFGNorm", "CFGNorm before", "TCFG", "APG", "RescaleCFG", "Mahiro", "FreSca"]


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_functions(agrees, name):
    from comfy_extras import nodes_apg, nodes_cfg, nodes_fresca, nodes_mahiro, nodes_model_advanced, nodes_tcfg

    node = {
        "CFGZeroStar": lambda m: nodes_cfg.CFGZeroStar.execute(m)[0],
        "CFGNorm": lambda m: nodes_cfg.CFGNorm.execute(m, 0.9)[0],
        "CFGNorm before": lambda m: nodes_cfg.CFGNorm.execute(m, 0.9, pre_cfg=True)[0],
        "TCFG": lambda m: nodes_tcfg.TCFG.execute(m)[0],
        "APG": lambda m: nodes_apg.APG.execute(m, 0.5, 2.0, -0.5)[0],
        "RescaleCFG": lambda m: nodes_model_advanced.RescaleCFG().patch(m, 0.7)[0],
        "Mahiro": lambda m: nodes_mahiro.Mahiro.execute(m)[0],
        "FreSca": lambda m: nodes_fresca.FreSca.execute(m, 1.0, 1.5, 3)[0],
    }[name]
    report = agrees(WAN, node, cfg=4.0)
    assert report.dense_calls == {} and report.sparse_calls == 2 * 3


def test_attention_multiply(agrees):
    """UNetSelfAttentionMultiply scales weights by their UNet names; of the video models LTX-Video has those."""
    from comfy_extras.nodes_attention_multiply import UNetSelfAttentionMultiply

    report = agrees(LTX, lambda m: UNetSelfAttentionMultiply.execute(m, 1.5, 1.0, 0.8, 1.2)[0], matters=1e-2)
    assert report.dense_calls == {} and report.sparse_calls == 2 * 3


# Step caches


@contextlib.contextmanager
def block_runs(network):
    """The steps in which the network's first block runs, whatever its forward's wrappers skip."""
    blocks = getattr(network, "double_blocks", None) or network.blocks
    first = next(iter(blocks.values() if isinstance(blocks, torch.nn.ModuleDict) else blocks))
    steps = []

    def note(block, args, kwargs):
        options = kwargs["transformer_options"]
        steps.append((options["sample_sigmas"] - options["sigmas"][0]).abs().argmin().item())

    handle = first.register_forward_pre_hook(note, with_kwargs=True)
    yield steps
    handle.remove()


def step_cache(name, model):
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    node = {"EasyCache": EasyCacheNode, "LazyCache": LazyCacheNode}[name]
    threshold = 0.3 if model == COSMOS else 2.0  # so that it skips some steps of a random model, not all
    return lambda m: node.execute(m, threshold, 0.0, 1.0, False)[0]


@pytest.mark.parametrize(
    "name, cache, order",
    [(WAN, "EasyCache", "before"), (WAN, "LazyCache", "after"), (HUNYUAN, "EasyCache", "after"), (COSMOS, "LazyCache", "before")],
)
def test_step_caches(model, with_both, name, cache, order):
    network, blocks, node = model(name).model.diffusion_model, VARIANTS[name].blocks, step_cache(cache, name)
    kwargs = {"steps": 8, "cfg": 4.0}
    with block_runs(network) as ran:
        dense = sample(name, node(model(name)), **kwargs)
    assert ran == sorted(set(ran)) and 2 < len(ran) < 8, "it must skip steps"
    # A skipped step is still a step: what comes after the warm-up is not put off by it.
    for warmup in (0, ran[2]):
        patched, stats = with_both(model(name), node, order, **{**EVERYWHERE, "warmup_steps": warmup})
        with block_runs(network) as runs:
            assert rel_l2(sample(name, patched, **kwargs), dense) <= 1e-4
        report = stats.latest()
        assert runs == ran and report.sparse_calls == blocks * sum(step >= warmup for step in ran)
        assert report.dense_calls == ({"warmup": 2 * blocks} if warmup else {})


# Blocks skipped, replaced and repeated


@pytest.fixture
def handovers(monkeypatch):
    """`handovers(blocks)`: pairs (block that left centroids, block that found them) of these blocks, as they run."""
    from svg2_pack.svg2_core.cache import CentroidCache

    now, author, pairs, handles = [None], {}, [], []
    get, put = CentroidCache.get, CentroidCache.put

    def found(self, key):
        entry = get(self, key)
        if entry is not None:
            pairs.append((author[id(entry)][1], now[0]))
        return entry

    def left(self, key, entry):
        author[id(entry)] = entry, now[0]  # keeps it, so that its id is not given to another
        put(self, key, entry)

    def watch(blocks):
        for number, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(lambda *_, number=number: now.__setitem__(0, number)))
        return pairs

    monkeypatch.setattr(CentroidCache, "get", found)
    monkeypatch.setattr(CentroidCache, "put", left)
    yield watch
    for handle in handles:
        handle.remove()


def skip_layers(name, simple: bool):
    """Skips block 1 of Wan; of HunyuanVideo double block 0 and single block 1."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple

    double, single = ("1", "") if name == WAN else ("0", "1")
    if simple:
        return lambda m: SkipLayerGuidanceDiTSimple.execute(m, 0.0, 1.0, double, single)[0]
    return lambda m: SkipLayerGuidanceDiT.execute(m, 2.0, 0.0, 1.0, double, single)[0]


@pytest.mark.parametrize("name, simple", [(HUNYUAN, False), (WAN, True)], ids=["SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple"])
def test_skip_layer_guidance(model, svg2, agrees, handovers, name, simple):
    report = agrees(name, skip_layers(name, simple), cfg=4.0, matters=1e-2)
    blocks, skipped = (3, 1) if name == WAN else (4, 2)
    # The pass with skipped blocks is one more (after the two in a batch), or takes the place of the negative one.
    assert report.sparse_calls == 2 * (blocks + blocks - skipped) and report.dense_calls == {}
    network = model(name).model.diffusion_model
    pairs = handovers(network.blocks if name == WAN else [*network.double_blocks, *network.single_blocks])
    patched, stats = svg2(model(name), **SPARSE)
    sample(name, skip_layers(name, simple)(patched), cfg=4.0)
    assert stats.latest().block_labels == [str(i) for i in range(blocks)]
    assert pairs and all(left == found for left, found in pairs)


def replaced(function, kind: str, index: int):
    """A node that puts a function in a block's place."""

    def node(model):
        model = model.clone()
        model.set_model_patch_replace(function, "dit", kind, index)
        return model

    return node


def weaker(args, extra):
    before = args["img"].clone()  # HunyuanVideo's blocks write into it
    out = extra["original_block"](args)
    return {**out, "img": torch.lerp(before, out["img"], 0.5)}


def twice(args, extra):
    return extra["original_block"]({**args, **extra["original_block"](args)})


@pytest.mark.parametrize(
    "name, kind, function, order",
    [(WAN, "double_block", weaker, "before"), (WAN, "double_block", twice, "after"), (HUNYUAN, "double_block", twice, "before"),
     (HUNYUAN, "single_block", twice, "after"), (HUNYUAN, "single_block", weaker, "before")],
)  # fmt: skip
def test_a_replaced_block(agrees, name, kind, function, order):
    report = agrees(name, replaced(function, kind, 1), order, matters=1e-2)
    number = "3" if kind == "single_block" else "1"
    assert report.dense_calls == {}
    assert [b for b in report.block_labels if "." in b] == ([f"{number}.1"] if function is twice else [])


COSMOS_BLOCKS = [f"diffusion_model.blocks.block{i}" for i in range(3)]


class Skip(torch.nn.Module):
    """Another node's stand-in for a block of Cosmos: passes the video through while `skips(sigma)`."""

    def __init__(self, block, skips):
        super().__init__()
        self.inner, self.skips, self.x_format = [block], skips, block.x_format

    def forward(self, x, *args, transformer_options, **kwargs):
        if self.skips(float(transformer_options["sigmas"][0])):
            return x
        return self.inner[0](x, *args, transformer_options=transformer_options, **kwargs)


SIGMAS = {"always": lambda sigma: True, "early": lambda sigma: sigma > 5, "late": lambda sigma: sigma < 5}


@pytest.mark.parametrize("when, order", [("always", "before"), ("early", "after"), ("late", "before")])
def test_a_skipped_block_of_cosmos(model, agrees, with_both, handovers, when, order):
    """The host announces no block numbers here: those after the skipped block keep theirs, and their centroids."""
    blocks = [model(COSMOS).get_model_object(name) for name in COSMOS_BLOCKS]

    def node(patcher):
        patcher = patcher.clone()
        patcher.add_object_patch(COSMOS_BLOCKS[1], Skip(blocks[1], SIGMAS[when]))
        return patcher

    report = agrees(COSMOS, node, order, steps=6, scheduler="karras", cfg=4.0, matters=1e-2)
    assert report.dense_calls == {}

    pairs = handovers(blocks)
    patched, stats = with_both(model(COSMOS), node, order, **SPARSE)
    sample(COSMOS, patched, steps=6, scheduler="karras", cfg=4.0)
    report = stats.latest()
    ran = dict(zip(report.block_labels, report.density_by_block_and_step, strict=True))
    skipped = [SIGMAS[when](step.sigma) for step in report.steps]
    assert 0 < sum(skipped) < 6 or when == "always"
    assert {label: [cell is None for cell in row] for label, row in ran.items() if label != "1"} == {
        "0": [False] * 6, "2": [False] * 6}  # fmt: skip
    assert [cell is None for cell in ran["1"]] == skipped if when != "always" else "1" not in ran
    assert pairs and all(left == found for left, found in pairs)


# Attention patches


def node(patch, kind):
    """A node that adds a patch of that kind."""

    def add(model):
        model = model.clone()
        model.set_model_patch(patch, kind)
        return model

    return add


@pytest.mark.parametrize("order", ORDERS)
def test_infinite_talk(agrees, order):
    """Two speakers: one patch looks at the queries and keys of self-attention, one adds sound after cross-attention."""
    import comfy.ldm.wan.model_multitalk as multitalk
    import comfy.model_patcher
    import comfy.ops

    class Talk(torch.nn.Module):
        """The host's MultiTalkModelPatch with fewer and smaller heads."""

        def __init__(self):
            super().__init__()
            made = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.manual_cast}
            self.blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(3))
            for block in self.blocks:
                block.audio_cross_attn = multitalk.SingleStreamMultiAttention(256, 64, 2, True, **made)
                block.norm_x = torch.nn.LayerNorm(256)

    talk = Talk().requires_grad_(False)
    tiny_models._randomise(talk, seed=3)
    patcher = comfy.model_patcher.ModelPatcher(talk, torch.device("cpu"), torch.device("cpu"))
    sound = torch.randn(1, 2, 8, 64, generator=torch.Generator().manual_seed(2))
    speakers = torch.zeros(2, 36, dtype=torch.bool)
    speakers[0, :18] = speakers[1, 18:] = True

    def add(model):
        model = model.clone()
        model.model_options["transformer_options"]["audio_embeds"] = sound
        model.set_model_patch(multitalk.MultiTalkCrossAttnPatch(patcher, 1.0), "attn2_patch")
        model.set_model_patch(multitalk.MultiTalkGetAttnMapPatch(speakers), "attn1_patch")
        return model

    report = agrees(WAN, add, order, matters=1e-2)
    assert report.dense_calls == {} and report.sparse_calls == 2 * 3


@pytest.mark.parametrize("name, order", [(HUNYUAN, "before"), (PREDICT2, "after")])
def test_a_patch_of_queries_and_values(agrees, name, order):
    def patch(q, k, v, pe, attn_mask, extra_options):
        return {"q": q * 1.3, "v": v.flip(-1)}

    assert agrees(name, node(patch, "attn1_patch"), order, matters=1e-2).dense_calls == {}


def hides(keys: slice, dtype=torch.float32, shape=(1, 1)):
    """An attention patch of HunyuanVideo, in its single blocks only: a mask `[*shape, keys]` that hides some keys.

    shape: None for one row per query.
    """

    def patch(q, k, v, pe, attn_mask, extra_options):
        if extra_options["block_type"] != "single":
            return {}
        seen = torch.ones(*(shape or q.shape[2:3]), k.shape[2], dtype=torch.bool)
        seen[..., keys] = False
        return {"attn_mask": seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)}

    return node(patch, "attn1_patch")


VIDEO, PROMPT = slice(40, 60), slice(3, 7)  # of 11 text tokens and 72 of video


@pytest.mark.parametrize("dtype, order", [(torch.float32, "before"), (torch.bool, "after")], ids=str)
def test_a_mask_over_video_keys_is_dense(agrees, dtype, order):
    report = agrees(HUNYUAN, hides(VIDEO, dtype), order, matters=1e-2)
    assert report.dense_calls == {"unsupported_mask": 2 * 2}, "the single blocks"
    assert report.sparse_calls == 2 * 2, "the double blocks"


def test_a_mask_per_query_is_dense(agrees):
    assert agrees(HUNYUAN, hides(VIDEO, shape=None), matters=1e-2).dense_calls == {"unsupported_mask": 2 * 2}


@pytest.mark.parametrize("shape, dtype", [((1,), torch.bool), ((1, 1), torch.float32), ((1, 1, 1), torch.bool)], ids=str)
def test_a_mask_over_text_keys_is_sparse(agrees, gpu_attention, dtype, shape):
    """The host's CPU default takes True for a logit of 1, so not by that."""
    report = agrees(HUNYUAN, hides(PROMPT, dtype, shape))
    assert report.dense_calls == {} and report.sparse_calls == 2 * 4


def test_masks_are_not_kept(model, svg2):
    """A mask per block, of 75,600 tokens squared: the host drops each when its block is done."""
    alive, most = weakref.WeakSet(), [0]

    class Mask(torch.Tensor):
        pass

    def patch(q, k, v, pe, attn_mask, extra_options):
        mask = torch.zeros(q.shape[2], q.shape[2]).as_subclass(Mask)
        alive.add(mask)
        most[0] = max(most[0], len(alive))
        return {"attn_mask": mask}

    patched, _ = svg2(model(HUNYUAN), **EVERYWHERE)
    sample(HUNYUAN, node(patch, "attn1_patch")(patched))
    assert most[0] <= 2


@pytest.mark.parametrize("order", ORDERS)
def test_nag(agrees, order):
    """Normalized Attention Guidance patches the output of attention, which the host allows for HunyuanVideo only."""
    from comfy_extras.nodes_nag import NAGuidance

    report = agrees(HUNYUAN, lambda m: NAGuidance.execute(m, 5.0, 0.5, 1.5)[0], order, matters=1e-2)
    assert report.dense_calls == {} and report.sparse_calls == 2 * 4


@pytest.mark.parametrize("cfg, order", [(1.0, "before"), (4.0, "after")])
def test_uni3c(agrees, order, cfg):
    """A ControlNet beside Wan's blocks: attention of its own, residuals added after each block."""
    import comfy.ldm.wan.uni3c
    import comfy.model_patcher
    import comfy.ops
    from comfy_extras.nodes_model_patch import WanUni3CControlnetApply

    controlnet = comfy.ldm.wan.uni3c.WanUni3CControlnet(
        conv_out_dim=128, dim=128, ffn_dim=256, num_heads=2, num_layers=2, time_embed_dim=256, out_proj_dim=256,
        mid_channels=16, dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast)  # fmt: skip
    tiny_models._randomise(controlnet.requires_grad_(False), seed=3)
    control = comfy.model_patcher.ModelPatcher(controlnet, torch.device("cpu"), torch.device("cpu"))

    class Encoder:
        """In the place of the VAE."""

        def temporal_compression_decode(self):
            return 4

        def spacial_compression_encode(self):
            return 8

        def encode(self, frames):
            return torch.randn(1, 16, 2, 12, 12, generator=torch.Generator().manual_seed(8))

    def apply(model):
        video = torch.zeros(5, 96, 96, 3)
        return WanUni3CControlnetApply().apply_patch(model, control, Encoder(), video, 1.0, 0.0, 1.0)[0]

    report = agrees(WAN, apply, order, matters=1e-2, cfg=cfg)
    assert report.dense_calls == {} and report.sparse_calls == 2 * 3


@pytest.mark.parametrize("name, order", [(HUNYUAN, "before"), (COSMOS, "after")])
def test_context_windows(agrees, name, order):
    """Wan's are in test_graphs_users_build.py."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    def windows(model):
        return ContextWindowsManualNode.execute(model, 3, 1, "standard_static", 1, False, "pyramid", 2, False)[0]

    report = agrees(name, windows, order, shape=torch.zeros(1, 16, 5, 12, 12), cfg=4.0, matters=1e-2)
    assert report.dense_calls == {} and report.sparse_calls == 2 * 2 * VARIANTS[name].blocks
    assert report.tokens == 4 * 36, "the host puts a frame before each window but the first"


# TorchCompileModel


@pytest.fixture
def dynamo():
    """Nothing compiled yet, and nothing left behind."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # faster
        yield
    torch._dynamo.reset()


def compiled(model, **kwargs):
    """As TorchCompileModel compiles, less the code generator."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    model = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict}, **kwargs)
    return model


def decisions(report):
    """What ran sparse where, and why not."""
    sparse = [[cell is not None for cell in row] for row in report.density_by_block_and_step]
    return report.dense_calls, report.block_labels, sparse


WHOLE, BLOCKS = [], COSMOS_BLOCKS


@pytest.mark.parametrize("name, keys", [(COSMOS, WHOLE), (COSMOS, BLOCKS)])
def test_torch_compile(model, svg2, gpu_attention, dynamo, name, keys):
    patched, stats = svg2(model(name), **{**SPARSE, "warmup_steps": 2, "dense_blocks": "1"})
    plain = sample(name, patched, steps=4)
    assert rel_l2(sample(name, compiled(patched, keys=keys), steps=4), plain) <= 1e-4
    blocks = VARIANTS[name].blocks
    assert decisions(stats.reports()[1]) == decisions(stats.reports()[0])
    assert stats.latest().dense_calls == {"warmup": 2 * blocks, "dense_block": 2}
    # The blocks of another sampler are the same modules; what was traced must not hold on to the first run.
    other, other_stats = svg2(model(name), **EVERYWHERE)
    assert rel_l2(sample(name, compiled(other, keys=keys)), sample(name, model(name))) <= 1e-4
    assert other_stats.latest().sparse_calls == 2 * blocks


@pytest.fixture(scope="module")
def two_blocks(host):
    """HunyuanVideo with a double block and a single one: what is traced takes its time for each block."""
    return tiny_models._hunyuan(HUNYUAN, sizes={"depth": 1, "depth_single_blocks": 1}).build()


def test_torch_compile_before_svg2(model, svg2, gpu_attention, dynamo):
    """Mochi announces no evaluations."""
    patched, stats = svg2(compiled(model(MOCHI)), **EVERYWHERE)
    assert rel_l2(sample(MOCHI, patched), sample(MOCHI, model(MOCHI))) <= 1e-4
    assert stats.latest().sparse_calls == 2 * VARIANTS[MOCHI].blocks and stats.latest().dense_calls == {}


@pytest.mark.skipif(
    not hasattr(torch.Tag, "cudagraph_unsafe"),
    reason="this torch cannot be told to keep an operator out of CUDA graphs: the graph breaks instead, which fullgraph refuses",
)
@pytest.mark.parametrize("backend, order", [("eager", "before"), ("aot_eager", "after")])
def test_blocks_compiled_in_one_piece(model, svg2, gpu_attention, dynamo, monkeypatch, backend, order):
    """fullgraph: nothing of ours breaks the graph, and each step and block still decides for itself."""
    import comfy.ldm.wan.model
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    monkeypatch.setattr(comfy.ldm.wan.model, "optimized_attention", attention_pytorch)
    keys = [f"diffusion_model.blocks.{i}" for i in range(3)]

    def in_one_piece(patcher):
        patcher = patcher.clone()
        set_torch_compile_wrapper(model=patcher, backend=backend, fullgraph=True, dynamic=False, keys=keys)
        return patcher

    inputs = {**SPARSE, "warmup_steps": 2, "dense_blocks": "1"}
    patched, stats = svg2(model(WAN), **inputs)
    plain = sample(WAN, patched, steps=4)
    if order == "before":
        both, both_stats = svg2(in_one_piece(model(WAN)), **inputs)
    else:
        both, both_stats = svg2(model(WAN), **inputs)
        both = in_one_piece(both)
    assert rel_l2(sample(WAN, both, steps=4), plain) <= 1e-4
    assert decisions(both_stats.latest()) == decisions(stats.latest())
    assert both_stats.latest().sparse_calls == 4


def test_a_compiled_model_without_svg2_and_then_with_it(two_blocks, svg2, gpu_attention, dynamo):
    """What a user does to compare."""
    dense = sample(HUNYUAN, compiled(two_blocks), steps=1)
    patched, stats = svg2(two_blocks, **EVERYWHERE)
    assert rel_l2(sample(HUNYUAN, compiled(patched), steps=1), dense) <= 1e-4
    assert stats.latest().sparse_calls == 2


def test_a_compiled_model_with_svg2_and_then_without_it(two_blocks, svg2, dynamo):
    """In an attention that the host does not trace in one piece."""
    dense = sample(HUNYUAN, two_blocks, steps=1)
    patched, stats = svg2(two_blocks, **SPARSE)
    assert rel_l2(sample(HUNYUAN, compiled(patched), steps=1), dense) > 1e-3 and stats.latest().sparse_calls == 2
    assert rel_l2(sample(HUNYUAN, compiled(two_blocks), steps=1), dense) <= 1e-4
