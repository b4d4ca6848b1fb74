"""SVG2 Report, Compare, Doctor and Fused Ops in the editor show what the server computed."""

import random

import pytest
from editor import ADD, DECODE, RENDERERS, SAMPLER, SVG2

SHOWN = """id => { const node = app.rootGraph.getNodeById(id), box = node.widgets.find(w => w.name === 'svg2_text')?.element;
    return { text: box?.querySelector('pre')?.textContent, link: box?.querySelector('a')?.href }; }"""
# A node's pictures: elements in Nodes 2.0, objects drawn on the canvas in the classic renderer.
IMAGES = """id => [...(app.rootGraph.getNodeById(id).imgs ?? []), ...document.querySelectorAll(`[data-node-id="${id}"] img`)]
    .filter(i => i.src.includes('/view?')).map(i => [i.src, i.naturalWidth])"""


async def history(tab) -> dict:
    """What the server says the last prompt gave, by node."""
    entries = await tab.page.evaluate("fetch('/history?max_items=1').then(r => r.json())")
    [entry] = entries.values()
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry["outputs"]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_report_and_compare(in_tab, demo, renderer):
    async def test(tab):
        await tab.load(demo())
        report = await tab.page.evaluate(ADD, ["SVG2Report", 1500, 0, [[SVG2, 1, "stats"], [SAMPLER, 0, "samples"], [DECODE, 0, "images"]]])
        links = [[2, 0, "model"], [5, 0, "positive"], [5, 1, "negative"], [5, 2, "latent_image"]]
        dense = await tab.page.evaluate(ADD, ["KSampler", 1500, 900, links])
        same = "([from, to]) => { const at = id => app.rootGraph.getNodeById(id); at(to).widgets.forEach((w, i) => { w.value = at(from).widgets[i].value }) }"
        await tab.page.evaluate(same, [SAMPLER, dense])
        decode = await tab.page.evaluate(ADD, ["SVG2DemoDecode", 1500, 1300, [[dense, 0, "samples"]]])
        compare = await tab.page.evaluate(ADD, ["SVG2Compare", 2300, 0, [[decode, 0, "reference"], [DECODE, 0, "candidate"]]])
        await tab.queue()
        await tab.idle()
        await tab.page.wait_for_timeout(1000)
        outputs = await history(tab)
        for node in (report, compare):
            await tab.look_at(node)
            shown, output = await tab.page.evaluate(SHOWN, node), outputs[str(node)]
            assert shown["text"] == "\n".join(output["text"]) and len(shown["text"].splitlines()) > 3
            await tab.page.wait_for_function(f"id => ({IMAGES})(id).some(([, width]) => width > 300)", arg=node)
            sources = {source for source, _ in await tab.page.evaluate(IMAGES, node)}
            assert any(output["images"][0]["filename"] in source for source in sources), sources
        # The file to download has the numbers that the panel and the text show.
        link = (await tab.page.evaluate(SHOWN, report))["link"]
        file = await tab.page.evaluate("url => fetch(url).then(r => r.json())", link)
        final = tab.messages[-1]["data"]
        assert file["density"] == pytest.approx(final["density"]) and f"density {100 * file['density']:.0f}%" in (await tab.panel(SVG2))["line"]
        assert f"{file['density']:.1%}" in (await tab.page.evaluate(SHOWN, report))["text"]

    in_tab(test, renderer=renderer)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_doctor_and_fused_ops(in_tab, demo, renderer):
    async def test(tab):
        await tab.load(demo())
        await tab.page.evaluate("value => { app.rootGraph.getNodeById(2).widgets[0].value = value }", 3 + random.random())  # not cached
        doctor = await tab.page.evaluate(ADD, ["SVG2Doctor", 1500, 0, []])
        fused = await tab.page.evaluate(ADD, ["SVG2FusedOps", 1500, 700, [[2, 0, "model"]]])
        await tab.page.evaluate("([from, to]) => { app.rootGraph.getNodeById(from).connect(0, app.rootGraph.getNodeById(to), 0) }", [fused, SVG2])
        await tab.queue()
        await tab.idle()
        await tab.page.wait_for_timeout(1000)
        outputs = await history(tab)
        for node, words in ((doctor, "auto takes: torch"), (fused, "Nothing was replaced")):
            text = (await tab.page.evaluate(SHOWN, node))["text"]
            assert text == "\n".join(outputs[str(node)]["text"]) and words in text

    in_tab(test, renderer=renderer)


def test_what_cannot_be_compared_is_an_error_at_the_node(in_tab, demo):
    async def test(tab):
        await tab.load(demo())
        start = await tab.page.evaluate("app.rootGraph.nodes.find(n => n.type === 'SVG2DemoStartFrame').id")
        compare = await tab.page.evaluate(ADD, ["SVG2Compare", 2300, 0, [[start, 0, "reference"], [DECODE, 0, "candidate"]]])
        await tab.queue()
        await tab.idle()
        await tab.page.wait_for_timeout(1000)
        entries = await tab.page.evaluate("fetch('/history?max_items=1').then(r => r.json())")
        [entry] = entries.values()
        [failure] = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
        assert failure["node_id"] == str(compare) and "reference" in failure["exception_message"] and "candidate" in failure["exception_message"]
        await tab.page.get_by_text("SVG2 Compare failed").first.wait_for()
        await tab.page.get_by_role("button", name="View details").click()
        await tab.page.get_by_text(failure["exception_message"].splitlines()[0][:60]).first.wait_for()

    in_tab(test)
