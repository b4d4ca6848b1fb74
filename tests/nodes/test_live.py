"""What a run tells the browser: one message at the start of each step and one at the end, without a wait for the device."""

import json
import threading
from types import SimpleNamespace

import pytest
import tiny_wan
import torch
from aiohttp import web
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 4
SPARSE = {"top_p": 0.3, "warmup_steps": 1, "dense_blocks": "0"}


class Listener:
    """In the place of the host's server: keeps what is sent, and to whom."""

    client_id = "tab"

    def __init__(self, graph="a graph"):
        extra = {"extra_pnginfo": {"workflow": {"id": graph}}}
        running = [(0, "prompt", {}, extra, [])]
        self.prompt_queue = SimpleNamespace(get_current_queue_volatile=lambda: (running, []))
        self.sent = []

    def send_sync(self, event, data, sid=None):
        self.sent.append((event, json.loads(json.dumps(data, allow_nan=False)), sid))

    @property
    def bodies(self):
        return [data for _, data, _ in self.sent]


@pytest.fixture
def listener(host, monkeypatch):
    from svg2_pack.nodes.telling import live

    server = Listener()
    monkeypatch.setattr(live, "running_server", lambda: server)
    monkeypatch.setattr(live, "_latest", type(live._latest)())
    return server


@pytest.fixture
def queued(host, monkeypatch):
    """`queued(model, node="7", **inputs)` runs the node as the host does for a queued prompt; -> (model, stats)."""
    from comfy_api.latest import io
    from comfy_execution.utils import CurrentNodeContext
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    contexts = [CurrentNodeContext("prompt", "sampler")]
    contexts[0].__enter__()

    def patch(model, node="7", **inputs):
        hidden = io.HiddenHolder(node, None, None, None, None, None)
        monkeypatch.setattr(SVG2SparseAttention, "hidden", hidden, raising=False)
        return SVG2SparseAttention.execute(model, **{"min_tokens": 0, **inputs}).result

    yield patch
    contexts[0].__exit__(None, None, None)


def test_a_message_a_step_and_one_at_the_end(wan, queued, listener):
    patched, stats = queued(wan, **SPARSE)
    tiny_wan.sample(patched, steps=STEPS)
    report = stats.latest()
    assert [event for event, *_ in listener.sent] == ["svg2.status"] * (STEPS + 1)
    assert {sid for *_, sid in listener.sent} == {"tab"}
    *steps, end = listener.bodies
    assert all((m["node"], m["prompt"], m["graph"]) == ("7", "prompt", "a graph") for m in listener.bodies)
    assert [(m["state"], m["step"], m["steps"]) for m in steps] == [("sampling", i + 1, STEPS) for i in range(STEPS)]
    assert [m["dense"] for m in steps] == ["warmup", None, None, None]
    for i, message in enumerate(steps[1:]):  # each tells of the step before it
        column = [row[i] for row in report.density_by_block_and_step]
        assert [(b[0], b[1]) for b in message["blocks"]] == list(zip(report.block_labels, column, strict=True))
    assert [b[2] for b in steps[1]["blocks"]] == ["warmup"] * 3
    assert [b[2] for b in steps[2]["blocks"]] == ["dense_block", None, None]
    assert end["state"] == "done" and end["density"] == report.density and end["sparse_steps"] == STEPS - 1
    assert end["settings"]["warmup_steps"] == 1 and end["settings"]["top_p"] == 0.3 and end["tokens"] == 320
    assert end["attention_speedup"] == report.attention_speedup > 0
    assert [reason["name"] for reason in end["reasons"]] == ["warmup", "dense_block"]


def test_why_it_ran_dense(wan, queued, listener):
    patched, _ = queued(wan, **{**SPARSE, "min_tokens": 1000, "dense_blocks": ""})
    tiny_wan.sample(patched, steps=STEPS)
    reason = next(r for r in listener.bodies[-1]["reasons"] if r["name"] == "short_sequence")
    assert reason["detail"] == "320 < 1,000 tokens" and not reason["expected"] and "min_tokens" in reason["sentence"]
    assert listener.bodies[-1]["density"] is None and listener.bodies[-1]["attention_speedup"] is None


def test_a_run_that_fails_says_stopped(wan, queued, listener, monkeypatch):
    patched, _ = queued(wan, **SPARSE)
    forward, calls = wan.model.diffusion_model.forward, []

    def broken(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return forward(*args, **kwargs)

    monkeypatch.setattr(wan.model.diffusion_model, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        tiny_wan.sample(patched, steps=STEPS)
    assert [m["state"] for m in listener.bodies] == ["sampling"] * 2 + ["stopped"]  # before the third evaluation began


def test_nobody_listens(wan, svg2, queued, listener):
    """A script has no node; a prompt without a tab (the API without a client_id) is nobody's."""
    scripted, _ = svg2(wan, **SPARSE)
    expected = tiny_wan.sample(scripted, steps=2)
    listener.client_id = None
    api, _ = queued(wan, **SPARSE)
    assert torch.equal(tiny_wan.sample(api, steps=2), expected)
    assert listener.sent == []


def test_a_reloaded_tab_gets_its_own_last_messages(wan, queued, listener):
    from svg2_pack.nodes.telling import live

    listener.routes = web.RouteTableDef()
    live.serve()
    [route] = listener.routes
    for node, tab in (("7", "tab"), ("8", "tab"), ("7", "another tab")):
        listener.client_id = tab
        tiny_wan.sample(queued(wan, node, **SPARSE)[0], steps=2)

    def ask(tab):
        import asyncio

        response = asyncio.run(route.handler(SimpleNamespace(query={"client_id": tab})))
        return json.loads(response.text)

    assert [(m["node"], m["state"]) for m in ask("tab")] == [("7", "done"), ("8", "done")]
    assert [m["node"] for m in ask("another tab")] == ["7"] and ask("a stranger") == []


def test_a_pack_that_is_installed_twice(host, listener, caplog):
    """aiohttp refuses a route that is there already, and with it ComfyUI would not start."""
    from svg2_pack.nodes.telling import live

    listener.routes = web.RouteTableDef()
    live.serve()
    live.serve()
    assert len(listener.routes) == 1 and "installed twice" in caplog.text
    web.Application().router.add_routes(listener.routes)


@pytest.mark.parametrize("extra", [None, "text", [1], {"workflow": "text"}, {"workflow": [1]}, {"workflow": {"id": 5}}])
def test_whatever_a_client_sends_the_run_goes_on(wan, queued, listener, extra):
    running = [(0, "prompt", {}, {"extra_pnginfo": extra}, [])]
    listener.prompt_queue.get_current_queue_volatile = lambda: (running, [])
    tiny_wan.sample(queued(wan, **SPARSE)[0], steps=2)
    assert [body["state"] for body in listener.bodies] == ["sampling"] * 2 + ["done"] and listener.bodies[0]["graph"] is None


def test_a_server_that_cannot_send_stops_no_run(wan, queued, listener, dense_sample, caplog):
    def broken(*_):
        raise RuntimeError("Event loop is closed")

    listener.send_sync = broken
    model, stats = queued(wan, top_p=1.0, warmup_steps=0, dense_blocks="")
    assert torch.allclose(tiny_wan.sample(model), dense_sample, atol=1e-3) and stats.latest().completed
    assert caplog.text.count("no live status of this run") == 1


def test_switched_off_it_says_so(wan, queued, listener):
    """For what an earlier run said is no longer so."""
    tiny_wan.sample(queued(wan, enabled=True, **SPARSE)[0], steps=2)
    queued(wan, enabled=False)
    assert listener.bodies[-1]["state"] == "off" and listener.bodies[-1]["serial"] > listener.bodies[-2]["serial"]


def test_a_run_of_which_nothing_is_known(wan, queued, listener, monkeypatch):
    """After a fault of the device every read fails."""
    from svg2_pack.svg2_core.stats import RunStats

    def fails(*_):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(RunStats, "report", fails)
    tiny_wan.sample(queued(wan, **SPARSE)[0], steps=2)
    assert [body["state"] for body in listener.bodies] == ["sampling"] * 2 + ["lost"]


@pytest.mark.parametrize("sampler", ["heun", "heunpp2", "uni_pc"])
def test_each_step_is_announced_once(wan, queued, listener, sampler):
    """Of several evaluations, and whatever guidance makes of them; heunpp2 looks ahead, and is told of where it has been."""
    tiny_wan.sample(queued(wan, **SPARSE)[0], steps=STEPS, sampler=sampler, cfg=3.0, shape=tiny_wan.latent(2, 8, 8))
    told = [body["step"] for body in listener.bodies[:-1]]
    assert told == sorted(set(told)) and told[-1] == STEPS
    assert sampler == "heunpp2" or len(told) == STEPS


def test_a_node_that_another_one_expanded_into(host):
    """Messages go to the node on the screen."""
    from comfy_api.latest import io
    from svg2_pack.nodes.sparse_attention import place_in_graph

    expanded = SimpleNamespace(get_display_node_id={"5.0.0.7": "5"}.get)
    assert place_in_graph(io.HiddenHolder("5.0.0.7", None, None, expanded, None, None)) == "5"
    assert place_in_graph(io.HiddenHolder("7", None, None, None, None, None)) == "7" and place_in_graph(None) is None


def test_only_so_many_are_kept(wan, queued, listener, monkeypatch):
    from svg2_pack.nodes.telling import live

    monkeypatch.setattr(live, "REMEMBERED", 2)
    for node in "123":
        tiny_wan.sample(queued(wan, node, **SPARSE)[0], steps=2)
    assert [node for *_, node in live._latest] == ["2", "3"]


class HostReads(TorchDispatchMode):
    """Counts the reads of a tensor's value inside the model's evaluations; on a GPU each waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_no_read_of_a_tensor_for_the_messages(wan, svg2, queued, listener, monkeypatch):
    """Densities reach the messages on the read that every evaluation has anyway."""
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (lists.append(threading.get_ident()), tolist(self))[1])

    def reads(model):
        lists.clear()
        with HostReads() as mode:
            tiny_wan.sample(model, steps=STEPS)
        return len(lists), mode.count

    silent, told = reads(svg2(wan, **SPARSE)[0]), reads(queued(wan, **SPARSE)[0])
    assert told == silent and len(listener.sent) == STEPS + 1


def test_a_run_without_dense_calls_times_one_for_comparison(wan, svg2, monkeypatch):
    """In its second sparse step, once; the answer stays the sparse one. Where the run has dense calls of its own, none is made."""
    from svg2_pack.nodes.patching import override

    for inputs, extra in (({"warmup_steps": 0, "dense_blocks": ""}, 1), ({"warmup_steps": 1, "dense_blocks": ""}, 0), ({"warmup_steps": 0, "dense_blocks": "0"}, 0)):
        calls, whole = [], override.Override._dense

        def noted(mine, func, qkv, heads, arguments, whole=whole, calls=calls):
            if qkv[0].shape == qkv[1].shape:  # over the video
                calls.append(arguments["transformer_options"]["svg2_call"].step)
            return whole(mine, func, qkv, heads, arguments)

        monkeypatch.setattr(override.Override, "_dense", noted)
        patched, stats = svg2(wan, **inputs)
        first = tiny_wan.sample(patched, steps=STEPS)
        report = stats.latest()
        assert len(calls) == sum(report.dense_calls.values()) + extra
        assert calls == [1] or not extra
        assert report.attention_speedup == report.dense_call_ms / report.sparse_call_ms > 0
        monkeypatch.undo()
        assert torch.equal(tiny_wan.sample(patched, steps=STEPS), first)


def test_a_comparison_that_does_not_fit_is_done_without(wan, svg2, monkeypatch):
    from svg2_pack.nodes.patching import override

    def short(mine, func, qkv, *args):
        if qkv[0].shape == qkv[1].shape:  # over the video
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(mine, func, qkv, *args)

    whole = override.Override._dense

    patched, stats = svg2(wan)
    expected = tiny_wan.sample(patched, steps=STEPS)
    monkeypatch.setattr(override.Override, "_dense", short)
    assert torch.equal(tiny_wan.sample(patched, steps=STEPS), expected)
    assert stats.latest().attention_speedup is None and stats.latest().dense_calls == {}
