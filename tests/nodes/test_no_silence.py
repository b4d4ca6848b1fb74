"""No silence: a run in which nothing ran sparse says why, wherever one looks. Blocks that another node runs are found."""

import contextlib
import json
import logging
import types

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.metrics import rel_l2
from tiny_wan import sample

EVERYWHERE = {"warmup_steps": 0, "dense_blocks": ""}
VARIANTS = {v.name: v for v in tiny_models.VARIANTS}


def own_attention(model):
    """A node that replaces the forward of each self-attention by one that computes it itself."""
    from comfy.ldm.flux.math import apply_rope1

    def forward(self, x, freqs, transformer_options=None, **kwargs):
        shape = *x.shape[:2], self.num_heads, self.head_dim
        q, k = (apply_rope1(norm(linear(x)).view(shape), freqs) for norm, linear in ((self.norm_q, self.q), (self.norm_k, self.k)))
        out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, self.v(x).view(shape))))
        return self.o(out.transpose(1, 2).flatten(2))

    model = model.clone()
    for i, block in enumerate(model.get_model_object("diffusion_model").blocks):
        model.add_object_patch(f"diffusion_model.blocks.{i}.self_attn.forward", types.MethodType(forward, block.self_attn))
    return model


def told_everywhere(report, caplog, words: str, name: str) -> None:
    """Log, report, JSON and the node's panel say the same."""
    from svg2_pack.nodes.report import summary
    from svg2_pack.nodes.telling.live import totals

    [notice] = [notice for notice in report.notices if words in notice]
    assert any(words in record.message for record in caplog.records)
    assert notice in summary(report) and notice in json.loads(json.dumps(report.to_dict()))["notices"]
    panel = totals(report, len(report.steps), types.SimpleNamespace(details={}))
    assert name in panel["dense_calls"] or name in [remark["name"] for remark in panel["remarks"]]


@pytest.mark.parametrize("order", ["before", "after"])
def test_attention_that_another_node_computes(wan, svg2, caplog, order):
    patched, stats = svg2(own_attention(wan) if order == "before" else wan, **EVERYWHERE)
    with caplog.at_level(logging.INFO, logger="svg2"):
        sample(patched if order == "before" else own_attention(patched))
    report = stats.latest()
    assert report.sparse_calls == 0 and report.dense_calls == {"never_came": 12}
    told_everywhere(report, caplog, "another node computes it itself", "never_came")


def test_attention_that_another_node_computes_in_one_block(wan, svg2):
    model = own_attention(wan)
    for i in (0, 2):
        model.object_patches.pop(f"diffusion_model.blocks.{i}.self_attn.forward")
    patched, stats = svg2(model, **EVERYWHERE)
    sample(patched, steps=2)
    report = stats.latest()
    assert report.sparse_calls == 4 and report.dense_calls == {"never_came": 2}
    assert report.reasons_by_block_and_step[report.block_labels.index("1")] == ["never_came"] * 2


@pytest.mark.parametrize(
    "inputs, words",
    [({"warmup_steps": 10000}, "warmup 12"), ({"warmup_steps": 0, "dense_blocks": "0-2"}, "dense_block 12"),
     ({"warmup_steps": 0, "end_percent": 0.0}, "past_end 12"), ({"warmup_steps": 2, "end_percent": 0.5}, "past_end 6")],
    ids=["warm-up", "blocks", "end", "both"],
)  # fmt: skip
def test_settings_that_leave_nothing(wan, svg2, caplog, inputs, words):
    patched, stats = svg2(wan, **inputs)
    with caplog.at_level(logging.INFO, logger="svg2"):
        sample(patched)
    told_everywhere(stats.latest(), caplog, words, "nothing_sparse")


def test_a_run_with_sparse_calls_needs_no_such_word(wan, svg2):
    patched, stats = svg2(wan, warmup_steps=2, dense_blocks="0")
    sample(patched)
    assert stats.latest().sparse_calls == 4 and "nothing_sparse" not in stats.latest().remarks


def test_a_run_that_was_stopped_in_its_warm_up_is_no_surprise(wan, svg2):
    def stop(*args):
        raise InterruptedError

    patched, stats = svg2(wan, warmup_steps=2)
    with contextlib.suppress(InterruptedError):
        sample(patched, callback=stop)
    assert not stats.latest().completed and stats.latest().notices == []


# Other nodes that run the blocks themselves, from a wrapper around each evaluation.


def around_each_evaluation(model, change):
    """change(network): a context manager, entered for each evaluation."""
    model = model.clone()
    network = model.get_model_object("diffusion_model")

    def wrapper(apply, args):
        with change(network):
            return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model


@contextlib.contextmanager
def members(network, **modules):
    before = {name: network._modules[name] for name in modules}
    network._modules.update(modules)
    try:
        yield
    finally:
        network._modules.update(before)


class Blocks(torch.nn.Module):
    """One module in place of a list of blocks, which it runs."""

    def __init__(self, first, second=()):
        super().__init__()
        self.first, self.second = torch.nn.ModuleList(first), torch.nn.ModuleList(second)

    def forward(self, *args, **kwargs):
        if "img" not in kwargs:
            x, *rest = args if args else (kwargs.pop("x"),)
            for block in self.first:
                x = block(x, *rest, **kwargs)
            return x
        img, txt = kwargs.pop("img"), kwargs.pop("txt")
        for block in self.first:
            img, txt = block(img=img, txt=txt, **kwargs)
        for name in ("modulation_dims_img", "modulation_dims_txt"):
            kwargs.pop(name, None)
        x = torch.cat([txt, img], 1)
        for block in self.second:
            x = block(x, **kwargs)
        return x[:, txt.shape[1] :], x[:, : txt.shape[1]]


class Nothing(torch.nn.Module):
    def forward(self, x, *args, **kwargs):
        return x


def one_module(network):
    if hasattr(network, "double_blocks"):
        both = Blocks(network.double_blocks, network.single_blocks)
        return members(network, double_blocks=torch.nn.ModuleList([both]), single_blocks=torch.nn.ModuleList([Nothing()]))
    return members(network, transformer_blocks=torch.nn.ModuleList([Blocks(network.transformer_blocks)]))


class Hidden(torch.nn.Module):
    """Runs blocks that it does not show as its own."""

    def __init__(self, blocks):
        super().__init__()
        self.run = lambda x, *args, **kwargs: Blocks(blocks)(x, *args, **kwargs)

    def forward(self, x, *args, **kwargs):
        return self.run(x, *args, **kwargs)


@pytest.fixture(scope="module", params=["hunyuan_video t2v", "ltxv t2v"])
def cached(host, request):
    variant = VARIANTS[request.param]
    model = variant.build()
    return variant, model, around_each_evaluation(model, one_module)


@pytest.mark.parametrize("inputs, dense", [(EVERYWHERE, 0), ({"warmup_steps": 0, "dense_blocks": "0,-1"}, 2)], ids=["all", "some"])
def test_one_module_in_place_of_the_blocks(cached, svg2, inputs, dense):
    """Its blocks are found and numbered as without it; the sample is the one without it."""
    variant, model, other = cached
    plain, plain_stats = svg2(model, **inputs)
    patched, stats = svg2(other, **inputs)
    assert torch.equal(tiny_models.sample(variant, patched), tiny_models.sample(variant, plain))
    report, expected = stats.latest(), plain_stats.latest()
    assert report.block_labels == expected.block_labels and report.dense_calls == expected.dense_calls
    assert report.sparse_calls == 2 * (variant.blocks - dense) == expected.sparse_calls


def test_blocks_that_nobody_can_find(host, svg2):
    """All of them run under the number of the one module that stands in their place: it is not taken for theirs."""
    variant = VARIANTS["ltxv t2v"]
    model = variant.build()
    other = around_each_evaluation(
        model, lambda network: members(network, transformer_blocks=torch.nn.ModuleList([Hidden(list(network.transformer_blocks))]))
    )
    patched, stats = svg2(other, warmup_steps=0, dense_blocks="0")
    assert torch.equal(tiny_models.sample(variant, patched), tiny_models.sample(variant, other))
    report = stats.latest()
    assert report.sparse_calls == 0 and set(report.dense_calls) == {"unknown_layout"}
    assert any("which block runs" in notice for notice in report.notices)


@pytest.mark.parametrize("given", ["nothing", "empty options", "options without a number"])
def test_blocks_that_are_called_without_options(wan, svg2, given):
    """A step cache's own loop over the blocks, in place of the model's: sparse, as with it."""
    from comfy.ldm.wan.model import sinusoidal_embedding_1d

    def loop(self, x, t, context, clip_fea=None, freqs=None, transformer_options=None, **kwargs):
        x = self.patch_embedding(x.float()).to(x.dtype)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        e = self.time_embedding(sinusoidal_embedding_1d(self.freq_dim, t).to(x.dtype))
        context, projected = self.text_embedding(context), self.time_projection(e).unflatten(1, (6, self.dim))
        options = {"nothing": {}, "empty options": {"transformer_options": {}},
                   "options without a number": {"transformer_options": transformer_options}}[given]  # fmt: skip
        for block in self.blocks:
            x = block(x, e=projected, freqs=freqs, context=context, context_img_len=None, **options)
        return self.unpatchify(self.head(x, e), grid)

    @contextlib.contextmanager
    def change(network):
        network.forward_orig = types.MethodType(loop, network)
        try:
            yield
        finally:
            del network.forward_orig

    other = around_each_evaluation(wan, change)
    patched, stats = svg2(other, **EVERYWHERE, top_p=1.0)
    assert rel_l2(sample(patched), sample(other)) <= 1e-4
    report = stats.latest()
    assert report.sparse_calls == 12 and report.dense_calls == {} and report.block_labels == ["0", "1", "2"]
