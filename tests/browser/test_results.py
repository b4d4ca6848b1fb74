"""SVG2 Report, Compare, Doctor and Fused Ops in the editor show what the server computed, and go on showing it."""

import random

import pytest
from editor import ADD, DECODE, RENDERERS, SAME, SAMPLER, SVG2

SHOWN = """id => { const node = app.rootGraph.getNodeById(id), box = node.widgets.find(w => w.name === 'svg2_text')?.element;
    return { text: box?.querySelector('pre')?.textContent, link: box?.querySelector('a')?.href }; }"""
# A node's pictures: elements in Nodes 2.0, objects drawn on the canvas in the classic renderer.
IMAGES = """id => [...(app.rootGraph.getNodeById(id).imgs ?? []), ...document.querySelectorAll(`[data-node-id="${id}"] img`)]
    .filter(i => i.src.includes('/view?')).map(i => [i.src, i.naturalWidth])"""

SAVED = "app.graphToPrompt().then(p => JSON.parse(JSON.stringify(p.workflow)))"
ALONE = """() => { app.graph.clear(); const node = LiteGraph.createNode('SVG2Doctor'); app.graph.add(node); node.pos = [100, 100]; return node.id; }"""


async def history(tab) -> dict:
    """What the server says the last prompt gave, by node."""
    entries = await tab.page.evaluate("fetch('/history?max_items=1').then(r => r.json())")
    [entry] = entries.values()
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry["outputs"]


async def text_of(tab, node) -> str:
    """What the node shows, once it shows something."""
    await tab.page.wait_for_function(f"id => ({SHOWN})(id).text", arg=node, timeout=60_000)
    return (await tab.page.evaluate(SHOWN, node))["text"]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_report_and_compare(in_tab, demo, renderer):
    async def test(tab):
        await tab.load(demo())
        report = await tab.page.evaluate(ADD, ["SVG2Report", 1500, 0, [[SVG2, 1, "stats"], [SAMPLER, 0, "samples"], [DECODE, 0, "images"]]])
        links = [[2, 0, "model"], [5, 0, "positive"], [5, 1, "negative"], [5, 2, "latent_image"]]
        dense = await tab.page.evaluate(ADD, ["KSampler", 1500, 900, links])
        await tab.page.evaluate(SAME, [SAMPLER, dense])
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
        assert file["density"] == pytest.approx(final["density"]) and f"density {100 * file['density']:.1f}%" in (await tab.panel(SVG2))["line"]
        assert file["error"] == final["error"] > 0 and f"attention error {100 * file['error']:.0f}%" in (await tab.panel(SVG2))["line"]
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
        for node, words in ((doctor, "auto takes: sdpa"), (fused, "Nothing was replaced")):
            text = (await tab.page.evaluate(SHOWN, node))["text"]
            assert text == "\n".join(outputs[str(node)]["text"]) and words in text

    in_tab(test, renderer=renderer)


def test_a_report_of_what_is_bypassed(in_tab, demo):
    async def test(tab):
        await tab.load(demo())
        report = await tab.page.evaluate(ADD, ["SVG2Report", 1500, 0, [[SVG2, 1, "stats"], [SAMPLER, 0, "samples"]]])
        await tab.page.evaluate("id => { app.rootGraph.getNodeById(id).mode = 4 }", SVG2)
        await tab.queue()
        assert "bypassed" in await text_of(tab, report)

    in_tab(test)


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


@pytest.mark.parametrize("renderer", RENDERERS)
def test_texts_stay(in_tab, demo, renderer):
    """After a run in a tab in the background, undo, and a reload of the page the nodes say what the server said."""

    async def test(tab):
        await tab.load(demo())
        report = await tab.page.evaluate(ADD, ["SVG2Report", 1500, 0, [[SVG2, 1, "stats"], [SAMPLER, 0, "samples"]]])
        doctor = await tab.page.evaluate(ADD, ["SVG2Doctor", 1500, 700, []])
        await tab.queue()
        await tab.page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        await tab.page.wait_for_function("!app.rootGraph.nodes.some(node => node.type === 'SVG2Report')")
        await tab.idle()
        await tab.page.wait_for_timeout(1000)
        await tab.page.evaluate("app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
        await tab.page.wait_for_function("app.rootGraph.nodes.some(node => node.type === 'SVG2Report')")
        outputs = await history(tab)
        expected = {node: "\n".join(outputs[str(node)]["text"]) for node in (report, doctor)}

        async def shows_them():
            for node, text in expected.items():
                assert await text_of(tab, node) == text
            assert ".json" in (await tab.page.evaluate(SHOWN, report))["link"]

        await shows_them()
        track = "app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()"
        await tab.page.evaluate(track)
        await tab.page.evaluate("id => { const node = app.rootGraph.getNodeById(id); node.widgets[2].value = 9; node.svg2Old = true }", SAMPLER)
        await tab.page.evaluate(track)
        await tab.page.evaluate("app.extensionManager.command.execute('Comfy.Undo')")
        await tab.page.wait_for_function("id => !app.rootGraph.getNodeById(id).svg2Old", arg=SAMPLER)
        await shows_them()
        await tab.page.wait_for_timeout(1500)  # the editor keeps its draft of the graph
        await tab.page.reload()
        await tab.ready()
        await shows_them()

    in_tab(test, renderer=renderer)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_file_stays_as_large_as_it_is(in_tab, renderer):
    """However often a file is opened, run and saved; and before the first run there is no box."""

    async def test(tab):
        doctor = await tab.page.evaluate(ALONE)
        await tab.page.wait_for_timeout(500)
        files = [await tab.page.evaluate(SAVED)]
        for _ in range(3):
            await tab.load({**files[-1], "id": None})  # as in a session that knows nothing of earlier runs
            assert (await tab.page.evaluate(SHOWN, doctor))["text"] is None
            await tab.queue()
            await text_of(tab, doctor)
            await tab.page.wait_for_timeout(500)
            files.append(await tab.page.evaluate(SAVED))
        new, *later = ([round(length) for length in file["nodes"][0]["size"]] for file in files)
        assert new[0] == later[0][0] and 100 < later[0][1] - new[1] < 150 and later == [later[0]] * 3
        await tab.load(files[-1])  # as in a session that does
        await text_of(tab, doctor)
        assert (await tab.page.evaluate(SAVED))["nodes"][0]["size"] == files[-1]["nodes"][0]["size"]

    in_tab(test, renderer=renderer)


def test_help_that_cannot_be_shown(in_tab):
    """A page that is not there, and an editor that cannot draw it: the address and what there is to say."""

    async def test(tab):
        script = await tab.page.evaluate("new URL('help.js', document.querySelector('link[href*=\"svg2.css\"]').href).href")
        opened = """async ([script, page]) => { await (await import(script)).openHelp(page); const boxes = [...document.querySelectorAll('.svg2-help')];
            return [boxes.at(-1).querySelector('a')?.href, boxes.at(-1).querySelector('pre')?.textContent, boxes.at(-1).querySelectorAll('h1').length]; }"""
        address, why, _ = await tab.page.evaluate(opened, [script, "Nowhere"])
        assert address.endswith("/docs/Nowhere.md") and why.startswith("404")
        [complaint] = tab.errors  # a file of the pack that is missing is never overlooked
        assert "404" in complaint and address in complaint
        tab.errors.clear()
        assert (await tab.page.evaluate(opened, [script, "SVG2Doctor"]))[2] == 1
        await tab.page.evaluate("app.extensionManager.renderMarkdownToHtml = undefined")
        address, text, headings = await tab.page.evaluate(opened, [script, "SVG2Doctor"])
        assert address.endswith("/docs/SVG2Doctor.md") and text.startswith("# ") and headings == 0

    in_tab(test)
