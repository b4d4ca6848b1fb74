"""What newer hosts than the pinned one do around attention calls, stood in for: containers that own q, k and v, attention that a
checkpoint asks for, records of a block's allocations or of the whole of it, and what their models have or leave out."""

import contextlib
import functools
import gc
import sys
import types
import weakref

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.metrics import rel_l2
from tiny_wan import sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

EVERYWHERE = {"warmup_steps": 0, "dense_blocks": ""}


class AttentionTensorContainer:
    """ComfyUI 0.38's: the single owner of a tensor until it is taken."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None, "taken already"
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


def newer(func):
    """ComfyUI 0.38's wrapper around an attention function."""

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        preferred = kwargs.pop("preferred_attention", None)
        containers = args[:3] if isinstance(args[0], AttentionTensorContainer) else None
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
            if override is not None:
                if containers is not None:
                    if hasattr(override, "container_function"):
                        return override.container_function(*args, **kwargs)
                    args = (*(c.take() for c in containers), *args[3:])
                return override(func, *args, **kwargs)
            if preferred is not None and preferred.function is not None:
                return preferred.function(*args, **kwargs)
        if containers is not None:
            args = (*(c.take() for c in containers), *args[3:])
        return func(*args, **kwargs)

    wrapper.container_function = None
    return wrapper


@pytest.fixture
def newer_attention(host, monkeypatch):
    """The host's attention as ComfyUI 0.38 has it; Wan's self-attentions hand it containers that are the only owners. Its `calls`:
    how many references there are to q, k and v while it computes self-attention."""
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.wan.model as wan

    plain, calls = attention.attention_pytorch.__wrapped__, []

    def compute(q, k, v, heads, **kwargs):
        if q.shape == k.shape:
            calls.append([sys.getrefcount(x) for x in (q, k, v)])
        return plain(q, k, v, heads, **kwargs)

    function = newer(compute)

    def call(q, k, v, heads, **kwargs):
        if q.shape != k.shape:
            return function(q, k, v, heads, **kwargs)
        return function(*(AttentionTensorContainer(x.clone()) for x in (q, k, v)), heads, **kwargs)

    monkeypatch.setattr(attention, "optimized_attention", function)
    monkeypatch.setattr(wan, "optimized_attention", call)
    return types.SimpleNamespace(calls=calls, function=function)


def test_containers_are_answered(wan, svg2, newer_attention):
    dense = sample(wan)
    patched, stats = svg2(wan, **EVERYWHERE, top_p=1.0)
    assert rel_l2(sample(patched), dense) <= 1e-4
    assert stats.latest().sparse_calls == 12 and stats.latest().dense_calls == {}


def test_dense_calls_own_what_was_in_the_containers(wan, svg2, newer_attention):
    """Nothing of ours holds q, k and v, 2 GB of a large video, while they are computed with."""
    sample(wan, steps=1)
    without = list(newer_attention.calls)
    newer_attention.calls.clear()
    patched, stats = svg2(wan, warmup_steps=1)
    sample(patched, steps=1)
    assert stats.latest().dense_calls == {"warmup": 3}
    assert newer_attention.calls == without and len(without) == 3


def test_containers_through_another_override(wan, svg2, newer_attention):
    """An older node's override takes plain tensors."""
    seen = []

    def other(func, q, k, v, heads, **kwargs):
        seen.append(type(q))
        return func(q, k, v, heads, **kwargs)

    model = wan.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = other
    dense = sample(wan)
    patched, stats = svg2(model, warmup_steps=2, dense_blocks="", top_p=1.0)
    assert rel_l2(sample(patched), dense) <= 1e-4
    assert stats.latest().sparse_calls == 6 and set(seen) == {torch.Tensor}


class ComfyAttention(torch.nn.Module):
    """The host's module of a checkpoint that asks for an attention of its own, such as INT8's."""

    def __init__(self, function):
        super().__init__()
        self.function = function


def test_attention_that_the_checkpoint_asks_for(host, svg2, newer_attention, monkeypatch):
    """Wan's self-attentions ask for one; dense calls get it, cross-attention does not, and sparse calls are sparse."""
    import tiny_wan

    asked = []

    def int8(q, k, v, heads, **kwargs):
        q, k, v = (x.take() if isinstance(x, AttentionTensorContainer) else x for x in (q, k, v))
        asked.append(k.shape[1])
        return newer_attention.function(q, k, v, heads, **kwargs)

    model = tiny_wan.random_wan()
    network = model.get_model_object("diffusion_model")
    for block in network.blocks:
        block.self_attn.preferred = ComfyAttention(int8)
    dense = sample(model)
    patched, stats = svg2(model, warmup_steps=2, dense_blocks="0", top_p=1.0)
    assert rel_l2(sample(patched), dense) <= 1e-4
    report = stats.latest()
    assert report.dense_calls == {"warmup": 6, "dense_block": 2} and report.sparse_calls == 4
    assert asked == [320] * 8
    assert all(not block.self_attn._forward_pre_hooks for block in network.blocks)


class Recorder(TorchDispatchMode):
    """Everything that operations make while the record is not paused."""

    def __init__(self):
        super().__init__()
        self.made, self.paused = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            given = {x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
            made = [x.untyped_storage() for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
            self.made += [weakref.ref(storage) for storage in made if storage.data_ptr() not in given]  # a view is not new
        return out

    @contextlib.contextmanager
    def pause(self):
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def alive(self, known: set) -> int:
        gc.collect()
        storages = {storage.data_ptr() for reference in self.made if (storage := reference()) is not None and storage.nbytes()}
        return len(storages - known)


@pytest.fixture(scope="module")
def minimax(host):
    variant = next(v for v in tiny_models.VARIANTS if v.name == "minimax t2v")
    return variant, variant.build()


@pytest.mark.parametrize("inputs", [EVERYWHERE, {"warmup_steps": 1, "dense_blocks": "0"}], ids=["sparse", "some dense"])
def test_what_outlives_an_evaluation_is_made_while_the_record_is_paused(minimax, svg2, monkeypatch, inputs):
    """From 0.35 on MiniMax-H3's allocations are recorded, and all must be freed by the evaluation's end."""
    import comfy.ldm.minimax.model as network

    variant, model = minimax
    own = {t.untyped_storage().data_ptr() for t in [*model.model.parameters(), *model.model.buffers()]}
    forward, left, recorder = network.MiniMaxH3Model.forward, [], None

    def recorded(self, *args, **kwargs):
        nonlocal recorder
        with Recorder() as recorder:
            out = forward(self, *args, **kwargs)
        kept = [x.clone() for x in out]
        del out
        left.append(recorder.alive(own))
        return kept

    monkeypatch.setattr(network.MiniMaxH3Model, "forward", recorded)
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", types.SimpleNamespace(pause_malloc_graph=lambda: recorder.pause()))
    tiny_models.sample(variant, model, steps=2, cfg=1.0)
    without = list(left)
    left.clear()
    patched, stats = svg2(model, **inputs)
    tiny_models.sample(variant, patched, steps=2, cfg=1.0)
    assert stats.latest().sparse_calls > 0
    assert left == without


def test_a_block_that_is_recorded_as_a_cuda_graph_is_dense(wan, svg2, dense_sample, monkeypatch):
    from svg2_pack.nodes.patching import override

    monkeypatch.setattr(override, "recorded", lambda device: True)
    patched, stats = svg2(wan, **EVERYWHERE)
    assert torch.equal(sample(patched), dense_sample)
    assert stats.latest().dense_calls == {"recorded": 12}
    assert any("CUDA graph" in notice for notice in stats.latest().notices)


@pytest.mark.parametrize("gated", [True, False])
def test_a_checkpoint_trained_for_a_sparse_attention_of_its_own(minimax, svg2, gated):
    """FastH3: newer hosts make a layer for its gate, which their own forward does not use."""
    variant, _ = minimax
    model = variant.build()
    dense = tiny_models.sample(variant, model)
    for block in model.get_model_object("diffusion_model").blocks:
        block.attn.to_gate_compress = torch.nn.Linear(256, 256, bias=False).requires_grad_(False) if gated else None
    patched, stats = svg2(model, **EVERYWHERE, top_p=1.0)
    assert rel_l2(tiny_models.sample(variant, patched), dense) <= 1e-4
    report = stats.latest()
    assert ("trained_sparse" in report.remarks) == gated == any("trained for a sparse attention" in x for x in report.notices)
    assert report.sparse_calls == 2 * variant.blocks


@pytest.mark.parametrize("option", ["stg_skip_self_attn", "run_vx"])
def test_blocks_that_are_told_to_leave_the_video_out(host, svg2, monkeypatch, option):
    """For guidance by what comes of it, newer hosts evaluate LTX-2 again with a block's self-attention left out, or without the
    video in it. That is no other node's doing, and no reason to warn."""
    import comfy.ldm.lightricks.model as network

    variant = next(v for v in tiny_models.VARIANTS if v.name == "ltxav t2v")
    forward = network.CrossAttention.forward

    def newer_forward(self, x, context=None, *args, transformer_options=None, **kwargs):
        if context is None and (transformer_options or {}).get("stg_skip_self_attn"):
            return self.to_out(self.to_v(x))
        return forward(self, x, context, *args, transformer_options=transformer_options, **kwargs)

    def replace(args, extra):
        told = {**args["transformer_options"], option: option == "stg_skip_self_attn"}
        return extra["original_block"]({**args, "transformer_options": told})

    monkeypatch.setattr(network.CrossAttention, "forward", newer_forward)
    model = variant.build().clone()
    model.set_model_patch_replace(replace, "dit", "double_block", 1)
    dense = tiny_models.sample(variant, model)
    patched, stats = svg2(model, **EVERYWHERE, top_p=1.0)
    assert rel_l2(tiny_models.sample(variant, patched), dense) <= 1e-4
    assert stats.latest().sparse_calls == 2 * 2 and stats.latest().dense_calls == {}
