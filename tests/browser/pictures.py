"""Take the pictures of the help pages: every node idle and finished, and in the other states it has, in both renderers; and
the thumbnail of the demo's workflow.

`python tests/browser/pictures.py [folder]`, web/docs/img/ unless a folder is given. About four minutes.
"""

import asyncio
import json
import sys
from pathlib import Path
from urllib.parse import urlencode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import environment  # noqa: E402

environment.ensure()

import editor  # noqa: E402
from editor import ADD, DECODE, SAME, SAMPLER, SVG2  # noqa: E402
from PIL import Image  # noqa: E402


def workflow(steps: int = 20) -> dict:
    """The demo's workflow with so many steps."""
    file, nodes = editor.demo()
    nodes[SAMPLER]["widgets_values"][2] = steps
    return file


def shrink(path: Path) -> None:
    """Few colours are enough for a node."""
    Image.open(path).convert("RGB").quantize(96).save(path, optimize=True)


async def finished(tab) -> None:
    await tab.queue()
    await asyncio.sleep(1)
    await tab.idle(600)
    await asyncio.sleep(1.5)


async def resize(tab, node, width: int, height: int) -> None:
    """Or as low as its contents let it be."""
    await tab.page.evaluate("([id, size]) => app.rootGraph.getNodeById(id).setSize(size)", [node, [width, height]])


async def sparse_attention(tab, shot) -> None:
    await tab.load(workflow())
    if await tab.page.evaluate("LiteGraph.vueNodesMode"):
        await resize(tab, SVG2, 330, 10)  # the file's size is for the classic renderer, which shows every input
    await shot("SVG2SparseAttention", "idle", SVG2)
    await tab.queue()
    while " 9/" not in ((await tab.panel(SVG2))["line"] or ""):
        await asyncio.sleep(0.05)
    await shot("SVG2SparseAttention", "running", SVG2)
    await tab.idle(600)
    await asyncio.sleep(1)
    await shot("SVG2SparseAttention", "finished", SVG2)
    await tab.page.evaluate("id => { app.rootGraph.getNodeById(id).widgets.find(w => w.name === 'min_tokens').value = -1 }", SVG2)
    await finished(tab)
    await shot("SVG2SparseAttention", "warning", SVG2)


async def save_pages(tab, folder: Path) -> None:
    """The pages of SVG2 Report as the server made them."""
    entries = await tab.page.evaluate("fetch('/history?max_items=1').then(r => r.json())")
    [pages] = [out["images"] for entry in entries.values() for out in entry["outputs"].values() if "svg2_json" in out]
    for number, page in enumerate(pages, 1):
        response = await tab.page.request.get(f"{tab.url}/view?{urlencode(page)}")
        path = folder / f"SVG2Report.page{number}.png"
        path.write_bytes(await response.body())
        shrink(path)


async def report_and_compare(tab, shot) -> None:
    await tab.load(workflow())
    report = await tab.page.evaluate(ADD, ["SVG2Report", 1500, 0, [[SVG2, 1, "stats"], [SAMPLER, 0, "samples"], [DECODE, 0, "images"]]])
    # The same video, sampled dense, to compare with.
    dense = await tab.page.evaluate(ADD, ["KSampler", 1500, 1400, [[2, 0, "model"], [5, 0, "positive"], [5, 1, "negative"], [5, 2, "latent_image"]]])
    await tab.page.evaluate(SAME, [SAMPLER, dense])
    decode = await tab.page.evaluate(ADD, ["SVG2DemoDecode", 1500, 1800, [[dense, 0, "samples"]]])
    compare = await tab.page.evaluate(ADD, ["SVG2Compare", 2300, 0, [[decode, 0, "reference"], [DECODE, 0, "candidate"]]])
    for kind, node in (("SVG2Report", report), ("SVG2Compare", compare)):
        await shot(kind, "idle", node)
    await finished(tab)
    for kind, node in (("SVG2Report", report), ("SVG2Compare", compare)):
        await resize(tab, node, *((720, 820) if kind == "SVG2Report" else (560, 760)))
        await shot(kind, "finished", node)
    await save_pages(tab, shot.folder)
    # Nothing sparse, and another seed: what they say when something is not as wanted.
    await tab.page.evaluate("id => { app.rootGraph.getNodeById(id).widgets.find(w => w.name === 'min_tokens').value = -1 }", SVG2)
    await tab.page.evaluate("id => { app.rootGraph.getNodeById(id).widgets[0].value += 1 }", SAMPLER)
    await finished(tab)
    for kind, node in (("SVG2Report", report), ("SVG2Compare", compare)):
        await shot(kind, "warning", node)


async def others(tab, shot) -> None:
    await tab.load(workflow(steps=2))
    doctor = await tab.page.evaluate(ADD, ["SVG2Doctor", 1500, 0, []])
    fused = await tab.page.evaluate(ADD, ["SVG2FusedOps", 1500, 700, [[2, 0, "model"]]])
    await tab.page.evaluate("([from, to]) => { app.rootGraph.getNodeById(from).connect(0, app.rootGraph.getNodeById(to), 0) }", [fused, SVG2])
    for kind, node in (("SVG2Doctor", doctor), ("SVG2FusedOps", fused)):
        await shot(kind, "idle", node)
    await finished(tab)
    for kind, node in (("SVG2Doctor", doctor), ("SVG2FusedOps", fused)):
        await resize(tab, node, 620, 620 if node == doctor else 380)
        await shot(kind, "finished", node)


async def demo_graph(tab, shot) -> None:
    """The thumbnails of the demo's workflows, which the template browser shows."""
    for name in ("demo_wan", "demo_wan_small"):
        await tab.load(json.loads((ROOT / f"workflows/{name}.json").read_text(encoding="utf-8")))
        path = shot.folder / f"{name}.png"
        await tab.picture(path, *await tab.page.evaluate("app.rootGraph.nodes.map(node => node.id)"), zoom=0.8)
        Image.open(path).convert("RGB").save(ROOT / f"workflows/{name}.jpg", quality=85, optimize=True)
        path.unlink()


def side_by_side(folder: Path, kind: str, states: tuple[str, ...], renderer: str) -> None:
    """One picture of a node in several states, for the README."""
    pictures = [Image.open(folder / f"{kind}.{state}.{renderer}.png").convert("RGB") for state in states]
    whole = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), pictures[0].getpixel((0, 0)))
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    path = folder / f"{kind}.states.png"
    whole.save(path)
    shrink(path)


async def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    async with editor.server() as server, editor.browser() as browser:
        for renderer in editor.RENDERERS:
            for scene in (sparse_attention, report_and_compare, others, *([demo_graph] if renderer == "classic" else [])):
                async with editor.tab(browser, server.url, renderer, size=(1400, 1100)) as tab:

                    async def shot(kind, state, node, tab=tab, renderer=renderer):
                        path = folder / f"{kind}.{state}.{renderer}.png"
                        await tab.picture(path, node)
                        shrink(path)
                        print(path.name, flush=True)

                    shot.folder = folder
                    await scene(tab, shot)
                    assert tab.errors == [], tab.errors
    side_by_side(folder, "SVG2SparseAttention", ("running", "finished", "warning"), "nodes2")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "web/docs/img"))
