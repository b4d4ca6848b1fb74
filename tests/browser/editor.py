"""The real front end in headless Chromium, talking to a real ComfyUI server that has this pack and the demo's nodes."""

import asyncio
import json
import os
import random
import re
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from chromium import find as chromium  # noqa: E402
from comfy_server import Server  # noqa: E402
from host import find  # noqa: E402

RENDERERS = ("classic", "nodes2")
SVG2, SAMPLER, DECODE = 3, 6, 7  # nodes of the demo's workflow
# Adds a node of this kind at this place, its inputs connected to these (node, output)s; its id.
ADD = """([kind, x, y, links]) => {
    const node = LiteGraph.createNode(kind), at = id => app.rootGraph.getNodeById(id);
    app.rootGraph.add(node); node.pos = [x, y];
    for (const [from, slot, input] of links) at(from).connect(slot, node, node.inputs.findIndex(i => i.name === input));
    return node.id; }"""
# Gives a node the values of another one of its kind.
SAME = "([from, to]) => { const at = id => app.rootGraph.getNodeById(id); at(to).widgets.forEach((w, i) => { w.value = at(from).widgets[i].value }) }"

# Complaints of the host itself, on a server with neither its cloud nor its manager.
NOT_OURS = ("favicon", "api.comfy.org", "Failed to load resource", "firebase", "userdata", "Manager", "GPU stall", "WebGL", "huggingface.co",
            "graph accessed before initialization")
OURS = ("/extensions/svg2", "/svg2/")  # what the pack serves: a complaint that names it always counts
# But for a help page in one language, which the editor asks for before the one for all.
FIRST_ASKED = re.compile(r"/docs/\w+/[\w-]+\.md")


def demo() -> tuple[dict, dict[int, dict]]:
    """The demo's workflow as its file has it, but for notes and with a seed nobody has used; and its nodes by id."""
    workflow = json.loads((ROOT / "workflows/demo_wan_small.json").read_text(encoding="utf-8"))
    workflow["nodes"] = [node for node in workflow["nodes"] if node["type"] not in ("Note", "MarkdownNote")]
    nodes = {node["id"]: node for node in workflow["nodes"]}
    nodes[SAMPLER]["widgets_values"][0] = random.randrange(2**40)
    return workflow, nodes


@asynccontextmanager
async def server():
    """A running ComfyUI on the CPU in a folder of its own; without Triton's interpreter, which is for the kernels' tests."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        async with Server(find(), Path(folder), Path(folder) / "server.log", cpu=True, environment=environment) as running:
            yield running


@asynccontextmanager
async def browser():
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        options = {"executable_path": chromium(), "args": ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]}
        running = await playwright.chromium.launch(**options)
        try:
            yield running
        finally:
            await running.close()


class Tab:
    """One tab of the editor. errors: what its console complained of."""

    def __init__(self, page, url: str):
        self.page, self.url, self.errors, self.messages = page, url, [], []
        page.on("console", lambda m: m.type == "error" and self._complain(f"{m.text} ({m.location.get('url', '')})"))
        page.on("pageerror", lambda error: self._complain(str(error)))
        page.on("websocket", lambda socket: socket.on("framereceived", self._hear))

    def _complain(self, text: str) -> None:
        ours = any(place in text for place in OURS) and not FIRST_ASKED.search(text)
        if ours or not any(word in text for word in NOT_OURS):
            self.errors.append(text)

    def _hear(self, payload) -> None:
        if isinstance(payload, str) and "svg2." in payload:
            self.messages.append(json.loads(payload))

    async def open(self):
        await self.page.goto(self.url)
        await self.ready()
        return self

    async def ready(self) -> None:
        """Until the editor and the pack's extension are up."""
        await self.page.wait_for_function("window.app?.canvas?.graph", timeout=90_000)
        await self.page.wait_for_function(
            "window.app.extensions.some(e => e.name === 'svg2.status')", timeout=30_000
        )
        await self.page.wait_for_timeout(800)
        await self.page.keyboard.press("Escape")

    async def load(self, workflow: dict | str) -> None:
        await self.page.evaluate("w => window.app.loadGraphData(w)", workflow)
        await self.page.wait_for_timeout(500)

    async def queue(self) -> None:
        await self.page.evaluate("window.app.queuePrompt(0)")

    async def idle(self, timeout: float = 120) -> None:
        """Until the server's queue is empty."""
        for _ in range(int(timeout / 0.2)):
            state = await self.page.evaluate("fetch('/queue').then(r => r.json())")
            if not state["queue_running"] and not state["queue_pending"]:
                return
            await asyncio.sleep(0.2)
        raise TimeoutError("the queue did not empty")

    async def panel(self, node: int | str) -> dict:
        """What the panel of an SVG2 node shows."""
        return await self.page.evaluate(
            """id => { const path = String(id).split(':'), at = path.pop();
               const graph = path.reduce((g, i) => g.getNodeById(i).subgraph, window.app.rootGraph);
               const e = graph.getNodeById(at)?.svg2Panel?.element;
               return !e ? null : { state: e.dataset.state, text: e.textContent, line: e.querySelector('.svg2-line')?.textContent,
                             bars: e.querySelectorAll('.svg2-bar').length, warning: e.querySelector('.svg2-warning')?.textContent }; }""",
            node,
        )

    async def look_at(self, *nodes, zoom: float = 1.0) -> None:
        """Bring nodes to the upper left of the canvas."""
        await self.page.evaluate(
            """([ids, zoom]) => { const found = ids.map(id => app.canvas.graph.getNodeById(id)), ds = app.canvas.ds;
               ds.scale = zoom;
               ds.offset[0] = 130 / zoom - Math.min(...found.map(n => n.pos[0]));
               ds.offset[1] = 150 / zoom - Math.min(...found.map(n => n.pos[1]));
               app.canvas.setDirty(true, true); }""",
            [list(nodes), zoom],
        )
        await self.page.wait_for_timeout(400)

    async def picture(self, path, *nodes, zoom: float = 1.0) -> None:
        """A screenshot of these nodes and nothing else."""
        await self.look_at(*nodes, zoom=zoom)
        x, y, width, height = await self.page.evaluate(
            """ids => { const boxes = ids.map(id => app.canvas.graph.getNodeById(id).getBounding()), ds = app.canvas.ds, pad = 8;
               const low = i => Math.min(...boxes.map(b => b[i])), high = i => Math.max(...boxes.map(b => b[i] + b[i + 2]));
               const c = app.canvas.canvas.getBoundingClientRect();
               return [c.left + (low(0) + ds.offset[0]) * ds.scale - pad, c.top + (low(1) + ds.offset[1]) * ds.scale - pad,
                       (high(0) - low(0)) * ds.scale + 2 * pad, (high(1) - low(1)) * ds.scale + 2 * pad]; }""",
            list(nodes),
        )
        await self.page.screenshot(path=str(path), clip={"x": x, "y": y, "width": width, "height": height})


@asynccontextmanager
async def tab(running, url: str, renderer: str = "classic", theme: str = "dark", locale: str = "en", size=(1400, 900)):
    """A tab of its own, with the settings a user would have chosen in the editor's menu."""
    context = await running.new_context(viewport={"width": size[0], "height": size[1]})
    settings = {
        "Comfy.VueNodes.Enabled": renderer == "nodes2",
        "Comfy.ColorPalette": theme,
        "Comfy.Locale": locale,
        "Comfy.TutorialCompleted": True,
        "Comfy.InstalledVersion": "1.47.12",
        "Comfy.Workflow.ShowMissingModelsWarning": False,
    }
    answer = await context.request.post(f"{url}/settings", data=settings)
    assert answer.ok, await answer.text()
    page = await context.new_page()
    try:
        yield await Tab(page, url).open()
    finally:
        await context.close()
