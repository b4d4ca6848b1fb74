"""The live status in the SVG2 node, as a user of the editor sees it."""

import asyncio
import json

import pytest
from editor import RENDERERS, SAMPLER, SVG2

# For the page: turn a knob as a user does, take another seed, copy and paste the SVG2 node (its copy's id).
TURN = "([id, name, value]) => { const w = app.rootGraph.getNodeById(id).widgets.find(w => w.name === name); w.value = value; w.callback?.(value); }"
NEW_SEED = "id => { app.rootGraph.getNodeById(id).widgets[0].value += 1; }"
PASTE = """id => { app.canvas.selectNode(app.rootGraph.getNodeById(id)); app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard();
    return app.rootGraph.nodes.filter(n => n.type === 'SVG2SparseAttention' && n.id != id)[0].id; }"""


async def until(read, wanted, seconds=240):
    """The first of `read()`'s results that `wanted` accepts, and all of them."""
    seen = []
    for _ in range(int(seconds / 0.05)):
        seen.append(await read())
        if wanted(seen[-1]):
            return seen[-1], seen
        await asyncio.sleep(0.05)
    raise AssertionError(f"never came: {seen[-1]}")


def over(panel) -> bool:
    return panel["state"] not in ("idle", "sampling")


async def run(tab, node=SVG2):
    """Queue the graph and watch the panel until the run is over."""
    before = await tab.panel(node)
    await tab.queue()
    return await until(lambda: tab.panel(node), lambda panel: over(panel) and panel["text"] != before["text"])


@pytest.mark.parametrize("renderer", RENDERERS)
def test_the_line_follows_the_run(in_tab, demo, renderer):
    async def test(tab):
        await tab.load(demo(steps=8, width=160, length=33))
        idle = await tab.panel(SVG2)
        assert idle["state"] == "idle" and "balanced: density 5.0%" in idle["text"] and "no warm-up" in idle["text"]
        done, seen = await run(tab)
        lines = [panel["line"] for panel in seen if panel["state"] == "sampling"]
        assert any(line.startswith("sparse ") and "6/6 blocks · sdpa · step" in line for line in lines), set(lines)
        assert done["state"] == "done" and done["bars"] == 6 and "8 of 8 steps" in done["line"]
        assert "than dense attention in this run" in done["text"]
        assert "warm-up 0" in done["text"] and "density 5.0%" in done["text"], "what the knobs at auto came to"
        # At most one message a step, and one at the end.
        mine = [m["data"] for m in tab.messages if m["type"] == "svg2.status"]
        assert [m["state"] for m in mine] == ["sampling"] * 8 + ["done"] and [m["step"] for m in mine[:-1]] == [*range(1, 9)]
        shown = f"density {100 * mine[-1]['density']:.1f}%"
        assert shown in done["line"]

    in_tab(test, renderer=renderer)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_warning_with_help(in_tab, demo, renderer):
    async def test(tab):
        await tab.load(demo(min_tokens=-1, steps=8, width=160, length=33))
        panel, seen = await run(tab)
        assert panel["state"] == "done" and " < 8,192 tokens" in panel["warning"] and "shorter than min_tokens" in panel["warning"]
        lines = [each["line"] for each in seen if each["state"] == "sampling"]
        assert not any(line.startswith("sparse") for line in lines) and any("dense: short sequence" in line for line in lines), set(lines)
        await tab.look_at(SVG2)
        await tab.page.click(".svg2-warning a")
        await tab.page.wait_for_selector(".svg2-help h1")
        assert "SVG2 Sparse Attention" in await tab.page.inner_text(".svg2-help")

    in_tab(test, renderer=renderer)


def test_a_warm_up_that_is_asked_for(in_tab, demo):
    async def test(tab):
        await tab.load(demo(steps=8, width=160, length=33, warmup_steps=1, dense_blocks="0"))
        done, seen = await run(tab)
        lines = [panel["line"] for panel in seen if panel["state"] == "sampling"]
        assert any("dense: warm-up · step 1/8" in line for line in lines), set(lines)
        assert any(line.startswith("sparse ") and "5/6 blocks · sdpa · step" in line for line in lines), set(lines)
        assert "7 of 8 steps" in done["line"] and "warm-up 1" in done["text"]

    in_tab(test)


def test_a_backend_that_is_not_there(in_tab, demo):
    async def test(tab):
        await tab.load(demo(backend="triton"))
        panel, _ = await run(tab)
        assert panel["state"] == "done" and "Dense attention:" in panel["warning"] and "SVG2 Doctor" in panel["warning"]

    in_tab(test)


def test_the_preset_says_what_it_implies(in_tab, demo):
    async def test(tab):
        await tab.load(demo())
        await tab.page.evaluate(TURN, [SVG2, "preset", "paper"])
        text = (await tab.panel(SVG2))["text"]
        assert "paper: top-p 0.9" in text and "no compensation" in text and "k-means 50 + 2" in text
        await tab.page.evaluate(TURN, [SVG2, "top_p", 0.4])
        assert "top-p" not in (await tab.panel(SVG2))["text"], "no longer the preset's"
        await tab.page.evaluate(TURN, [SVG2, "enabled", False])
        assert "off" in (await tab.panel(SVG2))["text"]

    in_tab(test)


def test_a_reloaded_tab_goes_on(in_tab, demo):
    async def test(tab):
        await tab.load(demo(steps=20, width=320, height=192, length=33))
        await tab.queue()
        await until(lambda: tab.panel(SVG2), lambda panel: panel["state"] == "sampling")
        await tab.page.wait_for_timeout(1500)  # the editor keeps its draft
        await tab.page.reload()
        await tab.ready()
        panel, _ = await until(lambda: tab.panel(SVG2), over)
        assert panel["state"] == "done" and panel["bars"] == 6
        await tab.page.reload()
        await tab.ready()
        assert (await tab.panel(SVG2))["text"] == panel["text"], "after the run, too"

    in_tab(test)


def test_edits_during_and_after_a_run(in_tab, demo):
    """Undo, copies, bypass and deletion: nothing breaks, nobody shows what another node did."""

    async def test(tab):
        await tab.load(demo())
        done, _ = await run(tab)
        copy = await tab.page.evaluate(PASTE, SVG2)
        assert (await tab.panel(copy))["state"] == "idle" and (await tab.panel(SVG2))["text"] == done["text"]
        await tab.page.evaluate("app.extensionManager.command.execute('Comfy.Undo')")
        await tab.page.wait_for_timeout(800)
        assert (await tab.panel(SVG2))["text"] == done["text"], "undo makes the nodes anew"
        # Bypassed: no patch, no message; what the last run said stays.
        heard = len(tab.messages)
        await tab.page.evaluate("id => { app.rootGraph.getNodeById(id).mode = 4 }", SVG2)
        await tab.page.evaluate(NEW_SEED, SAMPLER)
        await tab.queue()
        await tab.idle()
        assert len(tab.messages) == heard
        # Deleted while it samples.
        await tab.load(demo(steps=12, length=33))
        await tab.queue()
        await until(lambda: tab.panel(SVG2), lambda panel: panel["state"] == "sampling")
        await tab.page.evaluate("id => app.rootGraph.remove(app.rootGraph.getNodeById(id))", SVG2)
        await tab.idle()
        assert await tab.panel(SVG2) is None and tab.messages[-1]["data"]["state"] == "done"

    in_tab(test)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_in_a_subgraph(in_tab, demo, renderer):
    """Also after the same node ran outside of it, from which the host must not take what the node inside is to do."""

    async def test(tab):
        await tab.load(demo())
        await run(tab)
        await tab.page.evaluate(NEW_SEED, SAMPLER)
        host = await tab.page.evaluate(
            "id => { const { node } = app.canvas.graph.convertToSubgraph(new Set([app.rootGraph.getNodeById(id)])); return node.id; }", SVG2
        )
        await tab.page.wait_for_timeout(500)
        inside = f"{host}:{SVG2}"
        done, _ = await run(tab, inside)
        assert done["state"] == "done" and tab.messages[-1]["data"]["node"] == inside
        await tab.page.evaluate("id => app.canvas.openSubgraph(app.rootGraph.getNodeById(id).subgraph)", host)
        await tab.page.wait_for_timeout(800)
        assert (await tab.panel(inside))["text"] == done["text"]
        assert await tab.page.is_visible(".svg2-panel .svg2-line")

    in_tab(test, renderer=renderer)


def test_queued_prompts_and_other_tabs(in_tab, loop, comfyui, chromium, demo):
    """Three prompts in a row, each told of; a second tab with the same node ids hears nothing."""
    from editor import tab as open_tab

    async def test(first):
        async with open_tab(chromium, comfyui.url) as second:
            await first.load(demo())
            await second.load(demo())
            for _ in range(3):
                await first.page.evaluate(NEW_SEED, SAMPLER)
                await first.queue()
            await first.idle()
            await first.page.wait_for_timeout(500)
            states = [m["data"]["state"] for m in first.messages]
            assert states == (["sampling"] * 4 + ["done"]) * 3
            assert len({m["data"]["prompt"] for m in first.messages}) == 3
            assert second.messages == [] and (await second.panel(SVG2))["state"] == "idle"
            # Another workflow in the first tab, with the same node id: what ran is not its.
            other = demo()
            other["id"] = "00000000-0000-4000-8000-000000000001"
            await first.load(other)
            assert (await first.panel(SVG2))["state"] == "idle"

    in_tab(test)


def test_an_image_of_the_workflow_has_no_trace_of_the_panel(in_tab, demo):
    """What is saved and queued is the same as without the panel."""

    async def test(tab):
        await tab.load(demo())
        await run(tab)
        saved, prompt = await tab.page.evaluate("app.graphToPrompt().then(p => [p.workflow, p.output])")
        node = next(n for n in saved["nodes"] if n["id"] in (SVG2, str(SVG2)))
        assert len(node["widgets_values"]) == 16 and "svg2" not in json.dumps(node["widgets_values"])
        assert not any("status" in name for name in prompt[str(SVG2)]["inputs"])

    in_tab(test)


def test_a_turned_knob_ends_what_the_last_run_said(in_tab, demo):
    async def test(tab):
        await tab.load(demo())
        await run(tab)
        await tab.page.evaluate(TURN, [SVG2, "preset", "quality"])
        assert "quality: density 10%" in (await tab.panel(SVG2))["text"] and (await tab.panel(SVG2))["state"] == "idle"
        await tab.page.evaluate(NEW_SEED, SAMPLER)
        done, _ = await run(tab)
        # Switched off without a touch of the widget's callback, as by a link: the server says so.
        await tab.page.evaluate("id => { app.rootGraph.getNodeById(id).widgets[0].value = false }", SVG2)
        await tab.page.evaluate(NEW_SEED, SAMPLER)
        await tab.queue()
        await tab.idle()
        await tab.page.wait_for_timeout(300)
        off = await tab.panel(SVG2)
        assert off["state"] == "off" and "off" in off["line"] and off["bars"] == 0 and done["bars"] == 6

    in_tab(test)


def test_a_pasted_node_tells_its_own_knobs(in_tab, demo):
    async def test(tab):
        await tab.load(demo(preset="paper"))
        copy = await tab.page.evaluate(PASTE, SVG2)
        text = (await tab.panel(copy))["text"]
        assert text.startswith("paper: top-p 0.9") and "by model" in text and "warm-up 20%" not in text

    in_tab(test)


def test_two_instances_of_a_subgraph(in_tab, demo):
    """They share their nodes, so the panel says which of them it speaks of."""

    async def test(tab):
        await tab.load(demo())
        host = await tab.page.evaluate(
            "id => app.canvas.graph.convertToSubgraph(new Set([app.rootGraph.getNodeById(id)])).node.id", SVG2
        )
        copy = await tab.page.evaluate(
            """([host, sampler]) => { const at = id => app.rootGraph.getNodeById(id), copy = LiteGraph.createNode(at(host).type);
               app.rootGraph.add(copy); at(2).connect(0, copy, 0); copy.connect(0, at(sampler), 0); return copy.id; }""",
            [host, SAMPLER],
        )
        same = await tab.page.evaluate("([a, b]) => app.rootGraph.getNodeById(a).subgraph === app.rootGraph.getNodeById(b).subgraph", [host, copy])
        inside = f"{copy}:{SVG2}"
        first, _ = await run(tab, inside)
        assert same and not first["line"].startswith("#")
        await tab.page.evaluate("([host, sampler]) => { app.rootGraph.getNodeById(host).connect(0, app.rootGraph.getNodeById(sampler), 0) }", [host, SAMPLER])
        await tab.page.evaluate(NEW_SEED, SAMPLER)
        await tab.queue()
        await tab.idle()
        await tab.page.wait_for_timeout(300)
        assert (await tab.panel(inside))["line"].startswith(f"#{host}:{SVG2} · density")

    in_tab(test)


def test_an_answer_that_comes_late_is_not_shown(in_tab, demo):
    """The tab asks what it missed; before the answer is there, the run is over."""

    async def test(tab):
        await tab.load(demo(steps=6))
        held = asyncio.Event()

        async def late(route):
            answer = await route.fetch()
            await held.wait()
            await route.fulfill(response=answer)

        await tab.queue()
        await until(lambda: tab.panel(SVG2), lambda panel: panel["state"] == "sampling")
        await tab.page.route("**/svg2/status*", late)
        await tab.page.evaluate("import('/scripts/api.js').then(({ api }) => api.dispatchCustomEvent('reconnected'))")
        done, _ = await until(lambda: tab.panel(SVG2), over)
        held.set()
        await tab.page.wait_for_timeout(500)
        assert (await tab.panel(SVG2))["text"] == done["text"]

    in_tab(test)


def test_a_server_that_was_started_again(in_tab, demo):
    """It knows nothing of the run that the old one was in: so says the panel, and not "sampling" for ever."""

    async def test(tab):
        await tab.load(demo(steps=40, width=320, height=192, length=33))
        await tab.queue()
        await until(lambda: tab.panel(SVG2), lambda panel: panel["state"] == "sampling")
        await tab.page.route("**/svg2/status*", lambda route: route.fulfill(json=[]))
        # Seen in the page itself, at once: here the old server goes on, and its next step would be shown again.
        line = await tab.page.evaluate(
            """async id => { const { api } = await import('/scripts/api.js'), { element } = app.rootGraph.getNodeById(id).svg2Panel;
               api.dispatchCustomEvent('reconnected');
               for (let i = 0; i < 4000 && element.dataset.state !== 'lost'; i++) await new Promise(done => setTimeout(done, 5));
               const line = element.dataset.state === 'lost' && element.querySelector('.svg2-line').textContent;
               await api.interrupt(); return line; }""",
            SVG2,
        )
        assert line and "broke off" in line
        await tab.idle()

    in_tab(test)
