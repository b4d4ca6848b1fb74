"""Finding the nodes, opening workflows and reading help, with the mouse and the keyboard of a user."""

import json
from pathlib import Path

import pytest
from editor import RENDERERS, SVG2
from playwright.async_api import TimeoutError
from test_status import over, until

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
DROP = """text => { const data = new DataTransfer();
    data.items.add(new File([text], 'demo_wan.json', { type: 'application/json' })); return data; }"""


SEARCH = "[data-testid^=search-category]"


async def search(tab, words: str, title: str) -> None:
    """Double-click the empty canvas, type, and wait for a result of this title."""
    for _ in range(3):  # on a busy machine the two clicks may come too far apart
        await tab.page.mouse.dblclick(700, 760)
        try:
            await tab.page.wait_for_selector(SEARCH, timeout=5000)
            break
        except TimeoutError:
            continue
    await tab.page.keyboard.type(words)
    await tab.page.locator("[data-testid=result-item]", has_text=title).first.wait_for()


async def drop(tab, text: str) -> None:
    """Drop a file of this content onto the canvas."""
    data = await tab.page.evaluate_handle(DROP, text)
    await tab.page.dispatch_event("#graph-canvas", "drop", {"dataTransfer": data})
    await tab.page.wait_for_function("app.rootGraph.nodes.some(node => node.type === 'SVG2SparseAttention')")
    await tab.page.wait_for_timeout(500)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_search_by_what_people_would_type(in_tab, renderer):
    wanted = {"speed up wan": "SVG2 Sparse Attention", "sparse attention": "SVG2 Sparse Attention", "psnr": "SVG2 Compare",
              "svg2 stats": "SVG2 Report", "svg2 not faster": "SVG2 Doctor", "fused rope": "SVG2 Fused Ops"}  # fmt: skip

    async def test(tab):
        await tab.page.evaluate("app.graph.clear()")
        for words, title in wanted.items():
            await search(tab, words, title)
            await tab.page.keyboard.press("Escape")
            await tab.page.wait_for_selector(SEARCH, state="detached")
        # And the first one found is added by Enter.
        await search(tab, "svg2 sparse", "SVG2 Sparse Attention")
        await tab.page.keyboard.press("Enter")
        await tab.page.wait_for_function("app.rootGraph.nodes.map(node => node.type).join() === 'SVG2SparseAttention'")

    in_tab(test, renderer=renderer)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_dropped_file_runs(in_tab, demo, renderer):
    async def test(tab):
        await drop(tab, json.dumps(demo()))
        await tab.page.keyboard.press("Control+Enter")  # the editor's shortcut for Run
        done, seen = await until(lambda: tab.panel(SVG2), over)
        assert done["state"] == "done" and any(panel["state"] == "sampling" for panel in seen)

    in_tab(test, renderer=renderer)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_help_of_the_editor(in_tab, demo, renderer):
    """The button Info above a selected node; the page has its picture, and names every input."""

    async def test(tab):
        await tab.load(demo())
        await tab.look_at(SVG2)
        await tab.page.evaluate("id => app.canvas.selectNode(app.rootGraph.getNodeById(id))", SVG2)
        await tab.page.click("[data-testid=info-button]")
        text = await (await tab.page.wait_for_selector(".node-help-content h1 ~ table")).evaluate("e => e.parentElement.textContent")
        names = await tab.page.evaluate("id => app.rootGraph.getNodeById(id).widgets.filter(w => w.name !== 'svg2_status').map(w => w.name)", SVG2)
        assert len(names) == 16 and [name for name in names if name not in text] == []
        images = "[...document.querySelectorAll('.node-help-content img')]"
        await tab.page.wait_for_function(f"{images}.length && {images}.every(image => image.complete)")
        assert await tab.page.evaluate(f"{images}.every(image => image.naturalWidth > 100)")

    in_tab(test, renderer=renderer)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_every_workflow_opens(in_tab, renderer):
    """No node is missing (the models are), every link is there, the API twin is what the editor exports, and the console
    says nothing (in_tab asserts that)."""

    async def test(tab):
        for path in WORKFLOWS:
            file = json.loads(path.read_text(encoding="utf-8"))
            await tab.load(file)
            nodes = await tab.page.evaluate("app.rootGraph.nodes.map(n => [Number(n.id), n.type, n.type in LiteGraph.registered_node_types])")
            assert {(i, kind) for i, kind, _ in nodes} == {(n["id"], n["type"]) for n in file["nodes"]}, path.name
            unknown = [kind for _, kind, known in nodes if not known]
            assert unknown == [], path.name
            assert await tab.page.evaluate("[...app.rootGraph.links.values()].length") == len(file["links"]), path.name
            twin = path.parent / "api" / path.name
            if not path.stem.startswith("demo_wan"):  # the demo submits the file itself
                exported = await tab.page.evaluate("async () => (await app.graphToPrompt()).output")
                assert exported == json.loads(twin.read_text(encoding="utf-8")), path.name

    in_tab(test, renderer=renderer)
