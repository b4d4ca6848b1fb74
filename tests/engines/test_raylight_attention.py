"""The attention of Raylight's workers, in one process with a stand-in for its modules: what is between its collectives, and nothing else."""

import contextlib
import sys
import types

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.metrics import rel_l2

VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
KNOBS = {"density": 0.3, "min_tokens": 0, "dense_blocks": "", "warmup_steps": 0, "k_clusters": 20}
CROSS = {"wan2.1 t2v": 3, "wan2.1 vace": 6}  # attentions over the text in an evaluation


class SharesHeads:
    """What a module of Raylight's holds on to: between its collectives it calls `ring_attn_fn`, all by name."""

    ulysses_pg = None

    def __init__(self):
        self.asked = []
        self.ring_attn_fn = self._dense

    def _dense(self, q, k, v, *unnamed, **named):
        self.asked.append((tuple(q.shape), tuple(k.shape), unnamed, named))
        from comfy.ldm.modules.attention import optimized_attention

        return optimized_attention(*(x.flatten(2) for x in (q, k, v)), q.shape[2]).view(q.shape)


@pytest.fixture
def raylight(host, monkeypatch):
    """Raylight as one GPU has it: Wan's blocks call an attention of its module, and never the host's override. -> what that holds."""
    import comfy.ldm.wan.model

    held = SharesHeads()

    def xfuser_optimized_attention(q, k, v, heads, *_, **__):
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        named = {"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "group": None}
        return held.ring_attn_fn(q, k, v, **named).flatten(2)

    parallel = {
        "_CFG": object(),
        "get_sequence_parallel_world_size": lambda: 1,
        "get_classifier_free_guidance_world_size": lambda: 1,
        "get_classifier_free_guidance_rank": lambda: 0,
    }
    for name, values in {
        "raylight.diffusion_models.wan.stand_in": {"xfuser_optimized_attention": xfuser_optimized_attention},
        "xfuser": {}, "xfuser.core": {}, "xfuser.core.distributed": parallel, "xfuser.core.distributed.parallel_state": parallel,
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(comfy.ldm.wan.model, "optimized_attention", xfuser_optimized_attention)
    return held


def patched(model, **knobs):
    from svg2_pack.nodes.raylight import worker

    return worker.patch(model, token="test", preset="auto", backend="auto", knobs={**KNOBS, **knobs}, gpus=1)


def report_of(model) -> dict:
    from svg2_pack.nodes.raylight import worker

    return worker.report(model, token="test")[1]


@pytest.mark.parametrize("name", CROSS)
def test_as_on_one_gpu(raylight, name, monkeypatch):
    """The same video and the same report as the host's own attention gives; the text's keys are nobody's block."""
    variant = VARIANTS[name]
    model = variant.build()
    before = tiny_models.sample(variant, model)
    twice = patched(patched(model))
    out, report = tiny_models.sample(variant, twice), report_of(twice)
    calls = 2 * variant.blocks
    assert report["sparse_calls"] == calls and report["cold_calls"] == 0 and report["dense_calls"] == {} and report["completed"]
    raylight.asked.clear()
    assert rel_l2(tiny_models.sample(variant, patched(model, density=1.0)), before) <= 1e-4
    over_the_video = [q for q, k, *_ in raylight.asked if q == k]
    assert len(over_the_video) == 1, "for a time to compare with"
    assert len(raylight.asked) == 2 * CROSS[name] + 1

    monkeypatch.undo()  # the host's attention again
    alone = patched(variant.build())
    assert torch.equal(tiny_models.sample(variant, alone), out)
    assert report_of(alone)["block_labels"] == report["block_labels"]


def test_without_svg2_it_is_as_before(raylight):
    """Of models in one process each has its own: what stands in its attention answers for nobody else."""
    from svg2_pack.nodes.raylight import worker

    variant = VARIANTS["wan2.1 t2v"]
    model = variant.build()
    before = tiny_models.sample(variant, model)
    with_svg2 = patched(model)
    assert not torch.equal(tiny_models.sample(variant, with_svg2), before)
    raylight.asked.clear()
    assert torch.equal(tiny_models.sample(variant, model), before)
    assert torch.equal(tiny_models.sample(variant, worker.unpatch(with_svg2)), before)
    named = {"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "group": None}
    assert all(asked[2:] == ((), named) for asked in raylight.asked), "what is asked by name arrives by name"


def test_of_a_part_of_the_keys_the_reason_is_told(raylight, monkeypatch):
    """In a ring: as many tokens as no video has."""
    from svg2_pack.svg2_core.adapters import ulysses

    variant = VARIANTS["wan2.1 t2v"]
    model = patched(variant.build())
    monkeypatch.setattr(ulysses, "_why_not", lambda *_, **__: ulysses.Refusal(ulysses.Reason.UNKNOWN_LAYOUT, "a ring"))
    monkeypatch.setattr("svg2_pack.nodes.raylight.attention.find_sequence", None)
    tiny_models.sample(variant, model)
    report = report_of(model)
    assert report["dense_calls"] == {"unknown_layout": 2 * variant.blocks} and "a ring" in report["notices"][0]


@pytest.mark.parametrize("rank", [0, 1])
def test_conditionings_on_gpus_of_their_own(raylight, monkeypatch, rank):
    """The host still lists those of all GPUs: each knows its own again in the next step, in Raylight's attention and in the host's."""
    from comfy.patcher_extension import WrappersMP

    parallel = sys.modules["xfuser.core.distributed.parallel_state"]
    monkeypatch.setattr(parallel, "get_classifier_free_guidance_world_size", lambda: 2)
    monkeypatch.setattr(parallel, "get_classifier_free_guidance_rank", lambda: rank)
    rows = []

    def mine(executor, x, timestep, context, *args, **kwargs):
        """Raylight's wrapper: its part of the batch, gathered again."""
        out = executor(*(value[rank : rank + 1] for value in (x, timestep, context)), *args, **kwargs)
        return torch.cat([out, out])

    def look(executor, *args, **kwargs):
        from svg2_pack.nodes.patching.now import current

        rows.append(current().rows())
        return executor(*args, **kwargs)

    variant = VARIANTS["wan2.1 t2v"]
    model = variant.build()
    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, mine)
    model = patched(model)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    tiny_models.sample(variant, model, cfg=4.0)
    report = report_of(model)
    assert report["sparse_calls"] == 2 * variant.blocks and report["cold_calls"] == 0 and report["dense_calls"] == {}
    assert len(rows) == 2 and rows[0] == rows[1]
    ((conditioning, place),) = rows[0]
    assert conditioning[1] == rank ^ 1 and place == 0  # the host samples the negative first


def test_a_worker_without_xfuser(raylight, monkeypatch):
    """FSDP alone, or a sampler for each GPU: there are no groups, and the host's attention runs."""
    for name in [name for name in sys.modules if name.startswith("xfuser")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "xfuser", None)
    import comfy.ldm.modules.attention
    import comfy.ldm.wan.model

    monkeypatch.setattr(comfy.ldm.wan.model, "optimized_attention", comfy.ldm.modules.attention.optimized_attention)
    variant = VARIANTS["wan2.1 t2v"]
    model = patched(variant.build())
    tiny_models.sample(variant, model, cfg=4.0)
    assert report_of(model)["sparse_calls"] == 2 * variant.blocks and report_of(model)["cold_calls"] == 0


def test_what_the_host_records_of_a_block(raylight, monkeypatch):
    """Each sparse answer is made outside its record of allocations; a block that becomes a CUDA graph is dense."""
    from svg2_pack.nodes.raylight import attention
    from svg2_pack.svg2_core import session

    paused, answers, attend = [], [], session.svg2_attention

    @contextlib.contextmanager
    def pause():
        paused.append(True)
        yield
        paused.pop()

    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", types.SimpleNamespace(pause_malloc_graph=pause))
    monkeypatch.setattr(session, "svg2_attention", lambda *args, **named: answers.append(len(paused)) or attend(*args, **named))
    variant = VARIANTS["wan2.1 t2v"]
    model = patched(variant.build())
    tiny_models.sample(variant, model)
    assert answers == [1] * 2 * variant.blocks and not paused

    monkeypatch.setattr(attention, "recorded", lambda device: True)
    tiny_models.sample(variant, model)
    assert report_of(model)["dense_calls"] == {"recorded": 2 * variant.blocks} and len(answers) == 2 * variant.blocks
