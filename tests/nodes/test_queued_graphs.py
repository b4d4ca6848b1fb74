"""Graphs as the editor queues them, through the host's own loader of nodes, its validation, execution and caching."""

import asyncio
import copy
import json
import os
import sys
from pathlib import Path

import pytest
import tiny_wan
import torch
from hosts_queue import Queue, serving
from svg2_pack.svg2_core.metrics import rel_l2

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.xdist_group("queue")  # one host, set up once

# As the editor sends it: every input, advanced ones too.
AUTO = {"enabled": True, "preset": "auto", "q_clusters": 0, "k_clusters": 0, "top_p": 0.0, "warmup_steps": -1,
        "min_k_ratio": -1.0, "kmeans_init_iters": 0, "kmeans_iters": 0, "end_percent": 1.0, "dense_blocks": "auto",
        "min_tokens": 0, "compensation": "auto", "backend": "auto", "dense_attention": "auto", "density": 0.0}  # fmt: skip
SPARSE = {"top_p": 0.3, "warmup_steps": 1, "dense_blocks": ""}
STEPS = 3
BEHIND = {"svg2", "sampler", "latent", "decode", "save"}  # what depends on the node SVG2SparseAttention


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def sampler(model: str) -> dict:
    return node("KSampler", model=[model, 0], positive=["text", 0], negative=["text", 1], latent_image=["text", 2],
                seed=1, steps=STEPS, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0)  # fmt: skip


def outputs(name: str, of: str = "sampler", stats: str | None = "svg2") -> dict:
    """The sample in a file, and the report beside frames that nobody looks at."""
    report = {"stats": [stats, 1]} if stats else {}
    return {
        f"{name}latent": node("SaveLatent", samples=[of, 0], filename_prefix=f"{name}sample"),
        f"{name}decode": node("SVG2DemoDecode", samples=[of, 0]),
        f"{name}save": node("SVG2DemoSave", images=[f"{name}decode", 0], name=f"{name}report", **report),
    }


SOURCES = {
    "loader": node("UNETLoader", unet_name="tiny_wan.safetensors", weight_dtype="default"),
    "text": node("SVG2DemoConditioning", prompt="bunny", width=96, height=96, length=9),  # 3 x 12 x 12 latents
}


def graph(**knobs) -> dict:
    """Loader, SVG2, sampler."""
    svg2 = node("SVG2SparseAttention", model=["loader", 0], **{**AUTO, **SPARSE, **knobs})
    return copy.deepcopy({**SOURCES, "svg2": svg2, "sampler": sampler("svg2"), **outputs("")})


# What the editor sends of a bypassed node: the sampler on the loader, no stats. Of a muted one: no model and no stats.
BYPASSED = {**SOURCES, "sampler": sampler("loader"), **outputs("", stats=None)}
MUTED = copy.deepcopy(BYPASSED)
del MUTED["sampler"]["inputs"]["model"]


@pytest.fixture(scope="module")
def queue(host_base):
    """A Queue of a host that keeps its files in a folder of the tests', and knows the pack and a small model."""
    import comfy.utils
    import folder_paths

    base = host_base
    weights = dict(tiny_wan.random_wan().model.diffusion_model.state_dict())
    comfy.utils.save_torch_file(weights, str(base / "tiny_wan.safetensors"))
    models, path = folder_paths.get_folder_paths("diffusion_models"), list(sys.path)
    folder_paths.add_model_folder_path("diffusion_models", str(base))

    with serving() as server:
        import nodes  # puts the host's inner folder first on the path

        for pack in (ROOT, ROOT / "scripts" / "demo_nodes"):
            assert asyncio.run(nodes.load_custom_node(str(pack)))
        yield Queue(base, server)
    folder_paths.folder_names_and_paths["diffusion_models"][0][:] = models
    sys.path[:] = path


@pytest.fixture(scope="module")
def direct(queue):
    """`direct(**knobs)` -> the sample without a queue, from a model made for it alone; with knobs, through SVG2."""
    import nodes

    svg2 = nodes.NODE_CLASS_MAPPINGS["SVG2SparseAttention"]
    text = nodes.NODE_CLASS_MAPPINGS["SVG2DemoConditioning"]
    positive, negative, latent = text.execute(**SOURCES["text"]["inputs"]).result

    def sample(**knobs):
        model = tiny_wan.random_wan()
        if knobs:
            model = svg2.execute(model, **{**AUTO, **SPARSE, **knobs}).result[0]
        return tiny_wan.sample(model, steps=STEPS, shape=latent["samples"], positive=positive, negative=negative)

    return sample


def test_the_hosts_loader_knows_the_node(queue):
    import nodes

    info = nodes.NODE_CLASS_MAPPINGS["SVG2SparseAttention"].GET_NODE_INFO_V1()
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS["SVG2SparseAttention"] == "SVG2 Sparse Attention"
    assert info["output"] == ["MODEL", "SVG2_STATS"]
    assert set(info["input"]["required"]) == {"model"} and set(info["input"]["optional"]) == set(AUTO)
    json.dumps(info)  # as which the editor gets it
    assert Path(nodes.EXTENSION_WEB_DIRS[ROOT.name]).samefile(ROOT / "web")


def test_a_prompt_without_the_knobs_is_the_preset(queue):
    """As saved through the API before an input was added."""
    import execution

    graph = {"1": {"class_type": "SVG2SparseAttention", "inputs": {"model": ["2", 0]}},
             "2": {"class_type": "UNETLoader", "inputs": {"unet_name": "none", "weight_dtype": "default"}}}  # fmt: skip
    _, errors, _ = asyncio.run(execution.validate_inputs("p", graph, "1", {"2": (True, [], "2")}))
    assert errors == []


def test_the_queue_gives_what_a_script_gives(queue, direct):
    queue.forget()
    assert queue.run(graph()) == set(graph())
    assert torch.equal(queue.sample(), direct(top_p=0.3))
    report = queue.report()
    assert report["completed"] and report["tokens"] == 3 * 6 * 6 and len(report["steps"]) == STEPS
    assert report["sparse_calls"] == 3 * (STEPS - 1) and report["dense_calls"] == {"warmup": 3}
    assert 0 < report["density"] < 0.8 and report["backend"] == os.environ.get("SVG2_BACKEND", "sdpa")

    queue.run(graph(top_p=1.0))
    assert rel_l2(queue.sample(), direct()) <= 1e-4 < rel_l2(direct(top_p=0.3), direct())
    assert queue.report()["density"] == 1 and queue.report()["sparse_calls"] == 3 * (STEPS - 1)


CHANGES = [{"top_p": 0.6}, {"dense_blocks": "1"}, {"preset": "paper"}, {"enabled": False}]


@pytest.mark.parametrize("knobs", CHANGES, ids=str)
def test_a_changed_knob_and_back(queue, direct, knobs):
    """Only what hangs on it runs again, and gives what a graph queued first gives."""
    queue.forget()
    queue.run(graph())
    first = queue.sample()
    assert queue.run(graph()) == set(), "the same graph again: nothing to do"
    assert queue.run(graph(**knobs)) == BEHIND
    changed = queue.sample()
    assert torch.equal(changed, direct(**knobs)) and rel_l2(changed, first) > 1e-3
    assert queue.run(graph()) == BEHIND
    assert torch.equal(queue.sample(), first) and queue.report()["density"] < 0.8


def test_another_seed_keeps_the_patched_model(queue):
    """The node's outputs are cached: one model and one stats handle for all the runs to come."""
    queue.forget()
    queue.run(graph())
    first = queue.sample()
    other = graph()
    other["sampler"]["inputs"]["seed"] = 2
    assert queue.run(other) == BEHIND - {"svg2"}
    assert rel_l2(queue.sample(), first) > 0.1 and queue.report()["sparse_calls"] == 3 * (STEPS - 1)
    assert queue.run(graph()) == BEHIND - {"svg2"}
    assert torch.equal(queue.sample(), first)


def test_switched_off_bypassed_and_muted(queue, direct):
    queue.forget()
    queue.run(graph(enabled=False))
    assert torch.equal(queue.sample(), direct())
    assert json.loads((queue.output / "report.json").read_text())["reports"] == [], "a run without SVG2 has no report"
    queue.run(graph())
    assert not torch.equal(queue.sample(), direct())
    assert "loader" not in queue.run(BYPASSED)
    assert torch.equal(queue.sample(), direct()), "nothing of SVG2 is left on the cached model"

    # Muted, there is no model: the host refuses that branch in its own words, and runs the other.
    muted = {**MUTED, "other": sampler("loader"), **outputs("other", "other", None)}
    ok, _, runnable, complaints = queue.validate(muted)
    assert ok and set(runnable) == {"otherlatent", "othersave"}
    assert [e["type"] for e in complaints["sampler"]["errors"]] == ["required_input_missing"]
    queue.run(muted, runnable)
    assert torch.equal(queue.sample("other"), direct())


def test_two_nodes_and_two_samplers(queue, direct):
    queue.forget()
    two = {
        **graph(),
        "svg2b": node("SVG2SparseAttention", model=["loader", 0], **{**AUTO, **SPARSE, "top_p": 1.0}),
        "samplerb": sampler("svg2b"),
        **outputs("b", "samplerb", "svg2b"),
    }
    queue.run(two)
    assert torch.equal(queue.sample(), direct(top_p=0.3)) and torch.equal(queue.sample("b"), direct(top_p=1.0))
    assert queue.report()["density"] < 0.8 and queue.report("b")["density"] == 1
    two["svg2b"]["inputs"]["top_p"] = 0.6
    assert queue.run(two) == {"svg2b", "samplerb", "blatent", "bdecode", "bsave"}
    assert torch.equal(queue.sample("b"), direct(top_p=0.6))


def test_a_second_stage_with_a_node_of_its_own(queue):
    """The first sampler hands on a noisy latent, as the two models of Wan 2.2 do; the second has no warm-up."""
    stages = graph(warmup_steps=2)
    both = {"steps": 6, "noise_seed": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "positive": ["text", 0], "negative": ["text", 1]}  # fmt: skip
    stages["sampler"] = node("KSamplerAdvanced", model=["svg2", 0], latent_image=["text", 2], add_noise="enable",
                             start_at_step=0, end_at_step=3, return_with_leftover_noise="enable", **both)  # fmt: skip
    # Two nodes with the very same inputs would be one to the host, with one stats handle.
    knobs = {**AUTO, **SPARSE, "warmup_steps": 2, "top_p": 0.6}
    stages["svg2b"] = node("SVG2SparseAttention", model=["loader", 0], **knobs)
    stages["samplerb"] = node("KSamplerAdvanced", model=["svg2b", 0], latent_image=["sampler", 0], add_noise="disable",
                              start_at_step=3, end_at_step=10000, return_with_leftover_noise="disable",
                              **both)  # fmt: skip
    queue.run({**stages, **outputs("b", "samplerb", "svg2b")})
    assert [s["sparse"] for s in queue.report()["steps"]] == [False, False, True]
    assert [s["sparse"] for s in queue.report("b")["steps"]] == [True, True, True]


def pack(name: str):
    """A module of the pack as the host's loader has loaded it."""
    import nodes

    return sys.modules[nodes.NODE_CLASS_MAPPINGS["SVG2SparseAttention"].__module__.removesuffix("nodes.sparse_attention") + name]


def test_a_cancelled_prompt(queue, direct, monkeypatch):
    import nodes

    calls, whole = [], pack("svg2_core.session").svg2_attention

    def cancel(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            nodes.interrupt_processing()
        return whole(*args, **kwargs)

    queue.forget()
    with monkeypatch.context() as m:
        m.setattr(pack("svg2_core.session"), "svg2_attention", cancel)
        queue.run(graph())
    assert queue.events["execution_interrupted"]["node_id"] == "sampler" and len(calls) == 5
    assert queue.run(graph()) == BEHIND - {"svg2"}
    assert torch.equal(queue.sample(), direct(top_p=0.3)) and queue.report()["completed"]


def test_a_mistake_in_a_knob_stops_at_the_node(queue, direct):
    queue.forget()
    queue.run(graph(dense_blocks="3-x"))
    error = queue.events["execution_error"]
    assert error["node_id"] == "svg2" and error["exception_message"].startswith("dense_blocks: ")
    assert queue.run(graph()) >= BEHIND
    assert torch.equal(queue.sample(), direct(top_p=0.3))
