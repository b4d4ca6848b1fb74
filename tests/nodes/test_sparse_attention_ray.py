"""Ray itself on the CPU: the node sends its work to two actors that stand in for Raylight's, and gathers what they tell.

An actor is what Raylight's are for a node: it holds a ModelPatcher, runs functions on it and samples with it. Each has the whole model
here; how Raylight shares its heads out is tested by raylight_sources.py, which needs Raylight.
"""

import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="Ray is installed on Linux only")
pytestmark = pytest.mark.xdist_group("ray")

TESTS = Path(__file__).resolve().parents[1]
STEPS, BLOCKS = 2, 3
KNOBS = {"density": 0.3, "min_tokens": 0, "dense_blocks": "", "warmup_steps": 0, "k_clusters": 20}


class Actor:
    """parallel: what Raylight was started with."""

    def __init__(self, tests: str, parallel: dict):
        sys.path[:0] = [tests, f"{tests}/models", f"{tests}/nodes", f"{tests}/../scripts"]
        import host
        import torch

        torch.set_num_threads(1)
        host.activate(host.find(), cpu=True)
        import tiny_wan

        self.parallel, self.model = parallel, tiny_wan.random_wan()

    def get_parallel_dict(self) -> dict:
        return self.parallel

    def model_function_runner(self, fn, *args, **kwargs) -> None:
        self.model = fn(self.model, *args, **kwargs)

    def model_function_runner_get_values(self, fn, *args, **kwargs):
        return fn(self.model, *args, **kwargs)

    def sample(self, steps: int):
        import tiny_wan

        return tiny_wan.sample(self.model, steps=steps)

    def set_parallel(self, **degrees) -> None:
        self.parallel = degrees

    def forget_the_model(self) -> None:
        self.model = None


@pytest.fixture(scope="module")
def actors(host):
    place = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets want a short path
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", RAY_AUTH_MODE="disabled")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="ERROR", _temp_dir=place)
    try:
        parallel = {"ulysses_degree": 2, "ring_degree": 1}
        yield {"workers": [ray.remote(Actor).options(num_cpus=1).remote(str(TESTS), parallel) for _ in range(2)]}
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def node(monkeypatch):
    """As if Raylight were installed."""
    from svg2_pack.nodes.raylight import actors
    from svg2_pack.nodes.sparse_attention_ray import SVG2SparseAttentionRay

    monkeypatch.setattr(actors, "is_installed", lambda: True)
    return SVG2SparseAttentionRay


def sampled(actors: dict, steps: int = STEPS) -> list:
    return ray.get([actor.sample.remote(steps) for actor in actors["workers"]])


def test_two_actors_load_the_pack_and_sample_sparse(actors, node, wan, svg2, dense_sample):
    import tiny_wan
    import torch

    before = sampled(actors)
    for _ in range(2):  # a graph that runs again patches what is patched
        same, stats = node.execute(actors, **KNOBS).result
    assert same is actors and stats.latest() is None
    outs = sampled(actors)
    alone, alone_stats = svg2(wan, **KNOBS)
    expected = tiny_wan.sample(alone, steps=STEPS)
    assert all(torch.equal(out, expected) for out in outs) and not torch.equal(before[0], expected)
    report, one = stats.latest(), alone_stats.latest()
    assert report.sparse_calls == 2 * one.sparse_calls == 2 * STEPS * BLOCKS and report.dense_calls == {}
    assert report.density == pytest.approx(one.density) and report.error == pytest.approx(one.error)
    assert report.block_labels == one.block_labels and report.completed and report.settings == one.settings
    assert [line.partition(":")[0] for line in report.devices] == ["GPU 0", "GPU 1"] and "2 GPUs" in report.summary
    assert report.overlays.keys() == one.overlays.keys() and stats.latest() is report

    node.execute(actors, enabled=False)
    assert all(torch.equal(out, dense) for out, dense in zip(sampled(actors), before, strict=True))


def test_the_report_node_names_both(actors, node, temp):
    import torch
    from svg2_pack.nodes.report import SVG2Report

    _, stats = node.execute(actors, **KNOBS).result
    sampled(actors)
    *_, text = SVG2Report.execute({"samples": torch.zeros(1, 16, 5, 16, 16)}, stats).result
    assert "GPU 0: density" in text and "GPU 1: density" in text


def test_the_panel_hears_of_the_run(actors, node, monkeypatch):
    from svg2_pack.nodes.telling import live

    heard = []
    monkeypatch.setattr("svg2_pack.nodes.sparse_attention_ray.place_in_graph", lambda hidden: "7")
    monkeypatch.setattr(live.Live, "forward", lambda self, body: heard.append(body))
    node.execute(actors, **KNOBS)
    sampled(actors)
    deadline = time.monotonic() + 60
    while not (heard and heard[-1]["state"] == "done") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [body["state"] for body in heard] == ["sampling"] * STEPS + ["done"]
    assert [body["step"] for body in heard[:STEPS]] == [1, 2] and heard[-1]["density"] > 0

    def listening() -> int:
        return sum(thread.name == "svg2-raylight" for thread in threading.enumerate())

    node.execute(actors, **KNOBS)  # once more: whoever listened before does so no longer
    node.execute(actors, enabled=False)
    while listening() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert listening() == 0


def test_bad_input_is_one_sentence(actors, node, monkeypatch):
    from svg2_pack.nodes.raylight import actors as ours

    first = actors["workers"][0]
    with pytest.raises(ValueError, match="density and top_p are two rules"):
        node.execute(actors, **{**KNOBS, "top_p": 0.5})
    with pytest.raises(ValueError, match="backend"):
        node.execute(actors, backend="tritn", **KNOBS)
    for parallel, sentence in (
        ({"ulysses_degree": 1, "ring_degree": 2}, "^ray_actors: Raylight was started with ring_degree 2: "),
        ({"ulysses_degree": 2, "ring_degree": 1, "pipefusion_enabled": True}, "^ray_actors: Raylight was started with PipeFusion"),
        ({"ulysses_degree": 5, "ring_degree": 1}, r"^ray_actors: \d+ attention heads cannot be shared out evenly among 5 GPUs"),
    ):
        ray.get(first.set_parallel.remote(**parallel))
        with pytest.raises(ValueError, match=sentence):
            node.execute(actors, **KNOBS)
    ray.get(first.set_parallel.remote(ulysses_degree=2, ring_degree=1))
    monkeypatch.setattr(ours, "is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"^Raylight is not installed here"):
        node.execute(actors, **KNOBS)


def test_each_node_reports_its_own_runs(actors, node):
    """Two nodes one after the other on the same actors, as for two experts: the first one's report is asked for when the second has run."""
    _, first = node.execute(actors, **KNOBS).result
    sampled(actors, steps=1)
    _, second = node.execute(actors, **{**KNOBS, "density": 0.6}).result
    sampled(actors, steps=2)
    assert (first.latest().sparse_calls, second.latest().sparse_calls) == (2 * BLOCKS, 2 * 2 * BLOCKS)
    assert first.latest().settings["density"] == 0.3 and second.latest().settings["density"] == 0.6


def test_actors_that_are_gone(actors, node):
    """What is known of their runs stays, and nobody starts Ray anew to ask. Last: they do not come back."""
    _, stats = node.execute(actors, **KNOBS).result
    sampled(actors)
    report = stats.latest()
    for actor in actors["workers"]:
        ray.kill(actor)
    assert stats.latest() is report
    ray.shutdown()
    assert stats.latest() is report and not ray.is_initialized()
