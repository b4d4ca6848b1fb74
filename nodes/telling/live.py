"""What a run tells the browser: one message at the start of each step and one at the end, over the host's own websocket.
Numbers and names; the words around them are the browser's (web/js/status.js, locales/*/main.json).

A message goes to the tab that queued the prompt. The last one of each node is kept, so that a reloaded tab can ask for it
once. Without a server (tests, scripts) nothing is sent. Whatever goes wrong here, sampling goes on.
"""

import functools
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from comfy_execution.utils import get_executing_context

from ...svg2_core.reasons import Reason
from ...svg2_core.schedule import Schedule
from ...svg2_core.stats import Remark, RunReport, RunStats

EVENT = "svg2.status"
ROUTE = "/svg2/status"
REMEMBERED = 256  # messages, of all tabs together

log = logging.getLogger("svg2")

_latest: OrderedDict[tuple[str, str | None, str], dict] = OrderedDict()  # by tab, graph and node
_serial = 0.0  # of the last message; a browser shows none that is older than what it shows
_lock = threading.Lock()


def _never_fatal(tell: Callable) -> Callable:
    """The first failure to tell is logged, and the run goes on in silence."""

    @functools.wraps(tell)
    def guarded(self, *args) -> None:
        try:
            tell(self, *args)
        except Exception:
            log.exception("SVG2: no live status of this run")
            self._header = None

    return guarded


class Live:
    """The messages of one run of the SVG2 node `node` (its id in the prompt; None: nobody to tell)."""

    def __init__(self, node: str | None):
        self._header: dict | None = None
        self._step = -1
        self._steps_lock = threading.Lock()
        if node is not None:
            self._open(node)

    @_never_fatal
    def _open(self, node: str) -> None:
        self._server = running_server()
        self._tab = getattr(self._server, "client_id", None)
        if self._tab is not None:
            context = get_executing_context()
            prompt = context.prompt_id if context else _running_prompt(self._server)
            self._header = {"node": node, "prompt": prompt, "graph": _graph_of(self._server, prompt)}

    @_never_fatal
    def step(self, step: int, schedule: Schedule, stats: RunStats) -> None:
        """Announce a step at its first evaluation, once, whatever several GPUs or a sampler that goes back (heunpp2) do."""
        if self._header is None:  # not worth summing up for nobody
            return
        with self._steps_lock:
            if step <= self._step:
                return
            before, self._step = self._step, step
        self._send(progress(step, before, schedule, stats))

    @_never_fatal
    def end(self, report: RunReport, steps: int, stats: RunStats) -> None:
        """steps: of the sampler; one that another node skipped is not in the report."""
        self._send(totals(report, steps, stats))

    @_never_fatal
    def lost(self) -> None:
        """The run is over, and nothing is known of it."""
        self._send({"state": "lost"})

    @_never_fatal
    def off(self) -> None:
        """The node passes its model through: what an earlier run said is no longer so."""
        self._send({"state": "off"})

    @_never_fatal
    def forward(self, body: dict) -> None:
        """A message that another process made."""
        self._send(body)

    def _send(self, body: dict) -> None:
        global _serial
        if self._header is None:
            return
        with _lock:
            _serial = max(time.time(), _serial + 1e-6)  # rises over a restart of the server, too
            message = {**self._header, "serial": _serial, **body}
            self._keep(message)
        self._server.send_sync(EVENT, message, self._tab)

    def _keep(self, message: dict) -> None:
        key = (self._tab, message["graph"], message["node"])
        _latest[key] = message
        _latest.move_to_end(key)
        while len(_latest) > REMEMBERED:
            _latest.popitem(last=False)


def progress(step: int, before: int, schedule: Schedule, stats: RunStats) -> dict:
    """The step that begins, and what is known of the one before it."""
    reason = schedule.dense_step(step)
    return {
        "state": "sampling",
        "step": step + 1,
        "steps": schedule.steps,
        "dense": reason and reason.value,
        "blocks": [] if before < 0 else stats.blocks_at(before),
        "tokens": stats.tokens,
        "backend": stats.backend,
        "device": stats.device,
        "reasons": reasons(stats),
        "remarks": remarks(stats.remarks),
    }


def totals(report: RunReport, steps: int, stats: RunStats) -> dict:
    """The finished run."""
    return {
        "state": "done" if report.completed else "stopped",
        "steps": steps,
        "sparse_steps": sum(step.sparse for step in report.steps),
        "blocks": blocks_of(report),
        "density": report.density,
        "error": report.error,
        "sparse_share": report.sparse_share,
        "tokens": report.tokens,
        "backend": report.backend,
        "device": report.device,
        "attention_speedup": report.attention_speedup,
        "step_speedup": report.step_speedup,
        "dense_calls": report.dense_calls,
        "settings": report.settings,
        "reasons": reasons(stats),
        "remarks": remarks(report.remarks),
    }


def blocks_of(report: RunReport) -> list[tuple[str, float | None, str | None]]:
    """Each block with its mean density and the last reason it ran dense."""
    rows = zip(report.block_labels, report.density_by_block_and_step, report.reasons_by_block_and_step, strict=True)
    return [(label, _mean(densities), _last(names)) for label, densities, names in rows]


def reasons(stats: RunStats) -> list[dict]:
    """Why calls ran dense so far, each with its sentence; `expected` where the settings ask for it."""
    return [
        reason_entry(reason, detail)
        for reason, detail in list(stats.details.items())
        if reason not in (Reason.NOT_VIDEO_SELF_ATTENTION, Reason.NO_RUN)
    ]


def reason_entry(reason: Reason, detail: str = "") -> dict:
    """A reason as messages have it."""
    return {"name": reason.value, "sentence": reason.sentence, "detail": detail, "expected": reason.expected}


def remarks(known: dict[str, Remark]) -> list[dict]:
    """What ran so far, but not as the settings ask or the user hopes."""
    return [{"name": name, **remark._asdict()} for name, remark in list(known.items())]


def _mean(cells: list[float | None]) -> float | None:
    known = [cell for cell in cells if cell is not None]
    return sum(known) / len(known) if known else None


def _last(names: list[str | None]) -> str | None:
    return next((name for name in reversed(names) if name is not None), None)


def running_server():
    """The host's server in this process, or None. Not imported: where nobody started one, importing it would be a surprise."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _running_prompt(server) -> str | None:
    """Outside the host's own thread: what it executes now."""
    running, _ = server.prompt_queue.get_current_queue_volatile()
    return running[0][1] if len(running) == 1 else None


def _graph_of(server, prompt: str | None) -> str | None:
    """The id of the workflow that the running `prompt` was queued from: two tabs of the editor may use the same node ids."""
    running, _ = server.prompt_queue.get_current_queue_volatile()
    for _, prompt_id, _, extra_data, *_ in running:
        if prompt_id == prompt:
            return _within(extra_data, "extra_pnginfo", "workflow", "id")
    return None


def _within(tree, *names: str) -> str | None:
    """The text at this path of what a client sent, which may be of any form; None where there is none."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, str) else None


def serve() -> None:
    """Answer a tab that was reloaded with the last messages meant for it."""
    server = running_server()
    if server is None:
        return
    if any(getattr(route, "path", None) == ROUTE for route in server.routes):  # a second one would keep ComfyUI from starting
        log.warning("SVG2: this pack is installed twice; remove one of its folders in custom_nodes")
        return
    from aiohttp import web

    @server.routes.get(ROUTE)
    async def status(request):
        tab = request.query.get("client_id")
        return web.json_response([message for (owner, *_), message in list(_latest.items()) if owner == tab])
