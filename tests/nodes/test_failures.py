"""A run cancelled or failed, at whatever depth, ends with its own error, leaves nothing behind and spoils no other."""

import functools
import gc
import importlib
import weakref

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core import attention as algorithm
from svg2_pack.svg2_core import clustering
from svg2_pack.svg2_core.metrics import rel_l2
from svg2_pack.svg2_core.ops import registry

# Wan's blocks are announced by the host; those of Cosmos 1.0 are watched by hooks on its modules.
WAN, COSMOS = "wan2.1 t2v", "cosmos t2v"
VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
SPARSE = {"warmup_steps": 1, "dense_blocks": "", "density": 0.2}
STEPS = 3


class Broken(Exception):
    """What another node, or ours, raises."""


def case(name):
    """A variant, a model of it that the failures happen to, and what a model that they never happened to gives."""
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    variant = VARIANTS[name]
    spared, stats = SVG2SparseAttention.execute(variant.build(), min_tokens=0, **SPARSE).result
    fresh = sample(variant, spared)
    assert stats.latest().sparse_calls == 3 * (STEPS - 1)
    model = variant.build()
    sample(variant, model)  # what the host leaves on a model that has run, it leaves now
    return variant, model, fresh


@pytest.fixture(scope="module")
def cases(host):
    """`case`, once for each name."""
    return functools.cache(case)


@pytest.fixture
def wan_case(cases):
    return cases(WAN)


def sample(variant, model):
    return tiny_models.sample(variant, model, steps=STEPS, shape=torch.zeros(1, 16, 3, 12, 12))


def at_call(number: int, function, then):
    """`function`, that calls `then` first when it is called for the `number`th time."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            then()
        return function(*args, **kwargs)

    return counted


def fails(error: type[BaseException]):
    def raising(*args, **kwargs):
        raise error()  # a new one, which nobody keeps: it would keep its frames

    return raising


# Each arranges that sampling fails after some sparse calls, and gives the model to sample from and the error to expect.


def cancelled_in_a_block(model, monkeypatch):
    """As the stop button does it: a flag, which the host looks at before each of its operations."""
    import comfy.model_management as mm
    from svg2_pack.svg2_core import session

    monkeypatch.setattr(session, "svg2_attention", at_call(5, session.svg2_attention, mm.interrupt_current_processing))
    return model, mm.InterruptProcessingException


def cancelled_in_a_kernel(model, monkeypatch):
    import comfy.model_management as mm

    monkeypatch.setattr(algorithm, "near_field", at_call(5, algorithm.near_field, fails(mm.InterruptProcessingException)))
    return model, mm.InterruptProcessingException


def another_override(model, monkeypatch):
    from comfy.ldm.modules.attention import attention_pytorch

    model = model.clone()
    theirs = at_call(8, lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs), fails(Broken))
    model.model_options["transformer_options"]["optimized_attention_override"] = theirs
    return model, Broken


def a_block(model, monkeypatch):
    block = list(model.model.diffusion_model.blocks.children())[1]
    # Not setattr: pytest before 9.2 undoes that by leaving the class's method on the object.
    monkeypatch.setitem(vars(block), "forward", at_call(3, block.forward, fails(Broken)))
    return model, Broken


def another_model_wrapper(model, monkeypatch):
    from comfy.patcher_extension import WrappersMP

    def wrapper(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        after()
        return out

    after = at_call(2, lambda: None, fails(Broken))
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", wrapper)
    return model, Broken


def another_prepare_state(model, monkeypatch):
    from comfy.patcher_extension import CallbacksMP

    model = model.clone()
    model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "other", at_call(3, lambda *args: None, fails(Broken)))
    return model, Broken


def _our(module, name, number=3):
    def arrange(model, monkeypatch):
        place = importlib.import_module(f"svg2_pack.nodes.patching.{module}")
        monkeypatch.setattr(place, name, at_call(number, getattr(place, name), fails(Broken)))
        return model, Broken

    arrange.__name__ = f"our_{name}"
    return arrange


FAILURES = [cancelled_in_a_block, cancelled_in_a_kernel, another_override, a_block, another_model_wrapper,
            another_prepare_state, _our("run", "open_call"), _our("evaluation", "put_on_top"), _our("evaluation", "watch_blocks"),
            _our("override", "find_layout", 10)]  # fmt: skip
WITH_HOOKS = {"cancelled_in_a_block", "a_block", "our_put_on_top", "our_watch_blocks"}  # while those of Cosmos are on its modules
HAPPEN = [(WAN, f) for f in FAILURES if f.__name__ != "our_watch_blocks"] + [(COSMOS, f) for f in FAILURES if f.__name__ in WITH_HOOKS]


def traces(model) -> dict:
    """Everything on a model that a run could leave something on: its options and patches, and its modules' hooks."""

    def keys(options):
        return {k: keys(v) for k, v in options.items()} if isinstance(options, dict) else id(options)

    modules = list(model.model.modules())
    return {
        "options": keys(model.model_options),
        "wrappers": {kind: {k: len(w) for k, w in of.items()} for kind, of in model.wrappers.items()},
        "callbacks": {kind: {k: len(c) for k, c in of.items()} for kind, of in model.callbacks.items()},
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in modules],
        "attributes": [set(vars(m)) for m in modules],
    }


@pytest.mark.parametrize("name, arrange", HAPPEN, ids=lambda x: getattr(x, "__name__", x))
def test_the_next_run_is_as_if_nothing_had_happened(cases, svg2, name, arrange):
    from svg2_pack.nodes.patching import now, patch

    variant, model, fresh = cases(name)
    patched, stats = svg2(model, **SPARSE)
    before, runs = traces(patched), []

    class Watched(patch.Run):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            runs.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(patch, "Run", Watched)
        failing, error = arrange(patched, monkeypatch)
        with pytest.raises(error):
            sample(variant, failing)
    assert len(stats.reports()) == 1
    assert not stats.latest().completed and 0 < stats.latest().sparse_calls < 3 * (STEPS - 1)

    after = traces(patched)
    assert after == before
    assert now.current() is None
    gc.collect()
    assert len(runs) == 1 and runs[0]() is None
    del failing
    assert torch.equal(sample(variant, patched), fresh)
    assert stats.latest().completed and stats.latest().sparse_calls == 3 * (STEPS - 1)
    assert isinstance(registry.choose("auto", registry.Call(torch.device("cpu"), torch.float32, 128)), str), "not retired"


# Memory runs short inside our kernels, at each of their depths.


def short_on_the_gpu(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")


def short_on_the_cpu(*args, **kwargs):
    torch.empty(2**60, dtype=torch.uint8)


DEPTHS = [(clustering, "kmeans_in", 1, short_on_the_gpu), (clustering, "kmeans_in", 2, short_on_the_cpu), (algorithm, "moments", 1, short_on_the_gpu),
          (algorithm, "select_by_error", 1, short_on_the_cpu), (algorithm, "near_field", 1, short_on_the_gpu),
          (algorithm, "far_field", 1, short_on_the_cpu)]  # fmt: skip
each_depth, some_depths = (pytest.mark.parametrize("module, operation, number, shortage", of) for of in (DEPTHS, [DEPTHS[1], DEPTHS[2], DEPTHS[5]]))


@each_depth
def test_a_shortage_at_first_is_answered_with_fewer_heads(
    wan_case, svg2, monkeypatch, two_threads, module, operation, number, shortage
):
    """Heads are independent, so fewer at a time give the very same sample."""
    variant, model, _ = wan_case
    patched, stats = svg2(model, **SPARSE)
    fresh = sample(variant, patched)
    with monkeypatch.context() as m:
        m.setattr(module, operation, at_call(number, getattr(module, operation), shortage))
        assert torch.equal(sample(variant, patched), fresh)
    assert stats.latest().sparse_calls == 3 * (STEPS - 1) and stats.latest().dense_calls == {"warmup": 3}


@some_depths
def test_a_shortage_with_centroids_to_give_up(wan_case, svg2, monkeypatch, module, operation, number, shortage):
    """They are given up first: the heads stay together, and the sample stays sparse and right."""
    from svg2_pack.svg2_core import session

    variant, model, _ = wan_case
    heads = []

    def noted(*args, heads_at_a_time=None, **kwargs):
        heads.append(heads_at_a_time)
        return whole(*args, heads_at_a_time=heads_at_a_time, **kwargs)

    dense = sample(variant, model)
    whole, per_call = session.svg2_attention, 2 if operation == "kmeans_in" else 1
    everything = {"density": 0.9999}  # nearly: a density of 1 makes no stand-ins
    patched, stats = svg2(model, **{**SPARSE, **everything})
    with monkeypatch.context() as m:
        m.setattr(session, "svg2_attention", noted)
        m.setattr(module, operation, at_call(per_call * 3 + number, getattr(module, operation), shortage))
        assert rel_l2(sample(variant, patched), dense) <= 1e-4
    assert heads == [None] * (3 * (STEPS - 1) + 1)
    assert stats.latest().sparse_calls == 3 * (STEPS - 1) and stats.latest().dense_calls == {"warmup": 3}


@some_depths
def test_a_lasting_shortage_is_dense_for_that_run_only(wan_case, svg2, monkeypatch, module, operation, number, shortage):
    variant, model, fresh = wan_case
    patched, stats = svg2(model, **SPARSE)
    with monkeypatch.context() as m:
        m.setattr(module, operation, shortage)
        assert torch.equal(sample(variant, patched), sample(variant, model))
    assert stats.latest().dense_calls == {"warmup": 3, "out_of_memory": 3 * (STEPS - 1)} and stats.latest().completed
    assert torch.equal(sample(variant, patched), fresh)


def test_a_shortage_at_the_last_head(wan_case, svg2, monkeypatch):
    """The first head is in the result already; the host's attention answers for all."""
    variant, model, _ = wan_case
    whole = algorithm.near_field

    def second_head(q, *args, **kwargs):
        if q.shape[1] > 1 or q.storage_offset() > 0:
            short_on_the_gpu()
        seen.append(1)
        return whole(q, *args, **kwargs)

    seen = []
    patched, stats = svg2(model, **SPARSE)
    monkeypatch.setattr(algorithm, "near_field", second_head)
    assert torch.equal(sample(variant, patched), sample(variant, model))
    assert stats.latest().dense_calls["out_of_memory"] == len(seen) == 3 * (STEPS - 1)
