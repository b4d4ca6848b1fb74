"""One server, one Chromium and one event loop for all browser tests; each test opens tabs of its own."""

import asyncio
from pathlib import Path

import editor
import pytest


def pytest_collection_modifyitems(items):
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="session")
def loop():
    running = asyncio.new_event_loop()
    yield running
    running.close()


def _enter(loop, context):
    """Enter an async context for the rest of the session."""
    value = loop.run_until_complete(context.__aenter__())
    return value, lambda: loop.run_until_complete(context.__aexit__(None, None, None))


@pytest.fixture(scope="session")
def comfyui(loop):
    """A ComfyUI server with this pack and the demo's nodes."""
    value, leave = _enter(loop, editor.server())
    yield value
    leave()


@pytest.fixture(scope="session")
def chromium(loop):
    if editor.chromium() is None:
        pytest.skip("no Chromium: install Debian's or Ubuntu's package chromium, or Chrome, or name one in SVG2_CHROMIUM")
    value, leave = _enter(loop, editor.browser())
    yield value
    leave()


@pytest.fixture
def in_tab(loop, comfyui, chromium):
    """`in_tab(test, renderer=..., ...)` runs the coroutine `test(tab)`; whatever it does, the console must not complain."""

    def run(test, **options):
        async def whole():
            async with editor.tab(chromium, comfyui.url, **options) as tab:
                await test(tab)
                assert tab.errors == []

        loop.run_until_complete(whole())

    return run


@pytest.fixture
def demo():
    """`demo(steps=..., width=..., ...)`: the demo's workflow as a file's content, small, with a seed nobody has used."""

    def make(width=96, height=96, length=17, steps=4, **knobs) -> dict:
        workflow, nodes = editor.demo()
        nodes = {node["type"]: node for node in nodes.values()}
        assert {nodes[kind]["id"] for kind in ("SVG2SparseAttention", "KSampler", "SVG2DemoDecode")} == {editor.SVG2, editor.SAMPLER, editor.DECODE}
        nodes["SVG2DemoConditioning"]["widgets_values"][1:4] = [width, height, length]
        nodes["KSampler"]["widgets_values"][2] = steps
        order = ["enabled", "preset", "q_clusters", "k_clusters", "top_p", "warmup_steps", "min_k_ratio", "kmeans_init_iters",
                 "kmeans_iters", "end_percent", "dense_blocks", "min_tokens", "compensation", "backend"]  # fmt: skip
        for name, value in knobs.items():
            nodes["SVG2SparseAttention"]["widgets_values"][order.index(name)] = value
        return workflow

    return make
