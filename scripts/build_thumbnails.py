"""Picture the graphs of workflows/ in the real editor: `python scripts/build_thumbnails.py [NAME ...]`.

Starts ComfyUI on the CPU with an empty file in the place of each model, opens every workflow in headless Chromium and
saves what the canvas shows as workflows/NAME.jpg, which the template browser takes as the thumbnail. Refuses a graph
that the editor complains about: missing nodes, console errors, nodes that overlap, notes that are cut off, an API twin
that is not the editor's own export.
Needs Debian's `chromium` or another one named by $SVG2_CHROMIUM, a font with Chinese characters such as Debian's
`fonts-noto-cjk` (Wan's negative prompt is Chinese), and the Python package playwright.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import tempfile
from itertools import combinations
from pathlib import Path

import chromium
import environment
import host
from host import ROOT, SetupError

FOLDER = ROOT / "workflows"
LOG = ROOT / ".cache/thumbnails.log"
WIDTH, MOST_BYTES, MARGIN = 1280, 150_000, 24

# The editor without its panels, drawing every text however small.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.47.12",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.VueNodes.Enabled": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
OPEN = "async (graph) => { await app.loadGraphData(graph, true, true, null); }"
PLACES = """() => app.graph.nodes.map((n) => {
    const [x, y, w, h] = n.getBounding(); return {id: String(n.id), title: n.title, box: [x, y, w, h]};
})"""
GROUPS = "() => app.graph.groups.map((g) => [...g.pos, ...g.size])"
FIT = """([x, y]) => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [-x, -y]; app.canvas.setDirty(true, true); }"""
# Text that its box cuts off; of the notes only, for prompts scroll by design.
CUT = """() => [...document.querySelectorAll('.comfy-markdown-content, .comfy-markdown .tiptap')]
    .filter((e) => e.clientHeight && e.scrollHeight > e.clientHeight + 2)
    .map((e) => `${e.scrollHeight - e.clientHeight} px of "${e.innerText.slice(0, 30)}"`)"""
# The one button that is left in focus mode; those inside the canvas's nodes stay.
MENU = "button:not(.lg-node button) { visibility: hidden }"
EXPORT = "async () => (await app.graphToPrompt()).output"  # what the editor's Export (API) writes
MISSING = "() => [...document.querySelectorAll('[role=dialog]')].map((e) => e.innerText.slice(0, 200))"


def place_models(models: Path, workflows: list[dict]) -> None:
    """An empty file for each that a workflow loads, so that the editor misses none."""
    for workflow in workflows:
        for node in workflow["nodes"]:
            for file in node["properties"].get("models", []):
                path = models / file["directory"] / file["name"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()


def videos_of(workflows: list[dict]) -> list[str]:
    """The videos that workflows load. No installation has one, and the host's folder of inputs is not ours to write to."""
    return [node["widgets_values"][0] for graph in workflows for node in graph["nodes"] if node["type"] == "LoadVideo"]


class Editor:
    """`async with Editor(url, chromium) as editor`: the front end of the server at `url` in headless Chromium.

    videos: the editor is made to believe that the server has these, empty ones.
    """

    def __init__(self, url: str, chromium: str, settings: dict = SETTINGS, videos: list[str] | None = None):
        self.url, self.chromium, self.settings, self.videos = url, chromium, settings, videos or []
        self.complaints: list[str] = []

    async def __aenter__(self):
        from playwright.async_api import async_playwright

        self.playwright = await async_playwright().start()
        self.browser = await self.playwright.chromium.launch(executable_path=self.chromium, args=["--no-sandbox"])
        self.page = await self.browser.new_page(viewport={"width": WIDTH, "height": 800})
        await self.page.request.post(f"{self.url}/settings", data=self.settings)
        await self.page.route("**/object_info", self._list_videos)
        for video in self.videos:
            await self.page.route(f"**/view?*{video}*", lambda route: route.fulfill(content_type="video/mp4", body=b""))
        await self.page.goto(self.url)
        await self.page.wait_for_function(
            "!!(window.app?.canvas && window.LiteGraph?.registered_node_types?.SVG2Report)", timeout=120_000
        )
        await asyncio.sleep(2)
        # From here on: what the editor itself asks for at its start (settings nobody saved yet) is answered with 404.
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        return self

    async def __aexit__(self, *_):
        await self.browser.close()
        await self.playwright.stop()

    async def _list_videos(self, route) -> None:
        response = await route.fetch()
        info = await response.json()
        info["LoadVideo"]["input"]["required"]["file"][1]["options"] += self.videos
        await route.fulfill(response=response, json=info)

    async def open(self, workflow: dict) -> list[str]:
        """Load a graph. -> what is wrong with how it looks, in words"""
        self.complaints.clear()
        await self.page.evaluate(OPEN, workflow)
        await self.page.wait_for_load_state("networkidle")
        await asyncio.sleep(1)
        nodes = await self.page.evaluate(PLACES)
        wrong = [*self.complaints, *await self.page.evaluate(MISSING)]
        if len(nodes) != len(workflow["nodes"]):
            wrong.append(f"{len(nodes)} of {len(workflow['nodes'])} nodes were loaded")
        groups = await self.page.evaluate(GROUPS)
        outside = [node for node in nodes if not any(inside(node["box"], group) for group in groups)]
        wrong += [f"{node['title']} sticks out of its group" for node in outside]
        wrong += [
            f"{a['title']} lies over {b['title']}" for a, b in combinations(nodes, 2) if overlap(a["box"], b["box"])
        ]
        return wrong

    async def picture(self) -> tuple[bytes, list[str]]:
        """The whole graph at its own size, as PNG. -> the picture, and which notes are cut off"""
        boxes = await self.page.evaluate(GROUPS)
        left, top = (min(box[i] for box in boxes) - MARGIN for i in (0, 1))
        right, bottom = (max(box[i] + box[i + 2] for box in boxes) + MARGIN for i in (0, 1))
        size = {"width": round(right - left), "height": round(bottom - top)}
        await self.page.set_viewport_size(size)
        await self.page.evaluate("() => { app.extensionManager.focusMode = true }")
        await self.page.add_style_tag(content=MENU)
        await asyncio.sleep(0.5)
        await self.page.evaluate(FIT, [left, top])
        await asyncio.sleep(1.5)
        cut = await self.page.evaluate(CUT)
        return await self.page.screenshot(), cut


def inside(a: list, b: list) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[0] + a[2] <= b[0] + b[2] and a[1] + a[3] <= b[1] + b[3]


def overlap(a: list, b: list) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def compress(png: bytes) -> bytes:
    """A JPEG of WIDTH pixels that is small enough, as sharp as that allows."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    for quality in range(90, 30, -5):
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality, optimize=True, progressive=True)
        if out.tell() < MOST_BYTES:
            break
    return out.getvalue()


async def build(comfyui: Path, names: list[str], chromium: str, base: Path, output: Path) -> int:
    """Open each of these workflows and write its picture to `output`. -> how many do not look as they should"""
    from comfy_server import Server

    workflows = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    place_models(base / "models", list(workflows.values()))
    failed = 0
    videos = videos_of(list(workflows.values()))
    async with Server(comfyui, base, LOG, cpu=True) as server, Editor(server.url, chromium, videos=videos) as editor:
        for name, workflow in workflows.items():
            wrong = await editor.open(workflow)
            twin = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
            if await editor.page.evaluate(EXPORT) != twin:
                wrong.append("its API twin is not what the editor exports")
            png, cut = await editor.picture()
            wrong += cut
            picture = compress(png)
            (output / f"{name}.jpg").write_bytes(picture)
            print(f"{name}.jpg: {len(picture):,} bytes", *wrong, sep="\n  ")
            failed += bool(wrong)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", metavar="PATH", help="a ComfyUI folder to use (default: found or fetched)")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=FOLDER, help="where the pictures go (default: workflows/)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="workflows by name (default: all that are built)")
    args = parser.parse_args()
    comfyui = environment.ensure(args.comfyui)
    from workflows.recipes import RECIPES

    browser = chromium.find()
    if browser is None:
        raise SetupError("There is no Chromium: install Debian's chromium, or name one with SVG2_CHROMIUM=PATH.")
    with tempfile.TemporaryDirectory(prefix="svg2-thumbnails-") as base:
        failed = asyncio.run(build(comfyui, args.names or list(RECIPES), browser, Path(base), args.output))
    if failed:
        print(f"{failed} graphs do not look as they should", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    host.guarded(main)
