"""Raylight's actors, from the server's process: sending them work, and gathering what they tell.

An actor runs what it is sent on its own ModelPatcher. This pack cannot be imported there by name, so what is sent loads it from its
folder, once in an actor's process.
"""

import contextlib
import importlib.util
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import folder_paths

from ...svg2_core.merged_report import merge
from ...svg2_core.reasons import Reason
from ...svg2_core.stats import RunReport, StatsHandle
from ..telling.live import Live, blocks_of

log = logging.getLogger("svg2")

FOLDER = Path(__file__).resolve().parents[2]
ALIAS = "svg2_of_raylight"  # the pack's name inside an actor
ABSENT = "Raylight is not installed here: SVG2SparseAttentionRay serves Raylight's workers alone; SVG2 Sparse Attention serves one GPU"


def here() -> bool:
    """Whether Raylight is installed: loaded already, or in a folder beside this pack, which the host may load after it."""
    beside = (Path(folder).glob("*/src/raylight/__init__.py") for folder in folder_paths.get_folder_paths("custom_nodes"))
    names = [file.parents[2].name for files in beside for file in files]
    return importlib.util.find_spec("raylight") is not None or any(not name.endswith(".disabled") for name in names)


def call_of(name: str, folder: Path = FOLDER, **values) -> Callable:
    """A function of a model to send to an actor: worker.py's of that name, with those values.

    Made inside another one, so that it travels by value: by name nobody would find it there.
    """
    folder, name_there = str(folder), ALIAS

    def call(model):
        import importlib
        import sys
        import types
        from pathlib import Path

        if name_there not in sys.modules:
            # On another machine of a cluster Raylight puts ComfyUI's folder where its process runs.
            places = [Path(folder), Path.cwd() / "custom_nodes" / Path(folder).name]
            found = next((place for place in places if (place / "svg2_core").is_dir()), None)
            if found is None:
                raise ValueError(f"SVG2 is not on this worker's machine: there is no {places[0]} and no {places[1]}")
            for part in ("", ".nodes"):  # as packages alone: the nodes' own files want a server
                package = sys.modules[name_there + part] = types.ModuleType(name_there + part)
                package.__path__ = [str(found / part.removeprefix("."))]
        return getattr(importlib.import_module(f"{name_there}.nodes.raylight.worker"), name)(model, **values)

    return call


def degrees(actors: dict) -> tuple[int, int]:
    """How many GPUs share the heads, and how many the keys."""
    import ray

    found = ray.get(actors["workers"][0].get_parallel_dict.remote())
    return max(1, int(found.get("ulysses_degree") or 1)), max(1, int(found.get("ring_degree") or 1))


def change_models(actors: dict, calls: list[Callable]) -> None:
    """Have each actor replace its model by what its call makes of it. Raises ValueError with the sentence of the first that cannot."""
    import ray

    waiting = [actor.model_function_runner.remote(call) for actor, call in zip(actors["workers"], calls, strict=True)]
    failures = []
    for future in waiting:
        try:
            ray.get(future)
        except ray.exceptions.RayTaskError as error:
            failures.append(error)
    if failures:
        cause = getattr(failures[0], "cause", None)
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from failures[0]
        raise failures[0]


class GatheredStats(StatsHandle):
    """SVG2_STATS of a run on several GPUs: asks the actors, and keeps what they last told."""

    def __init__(self, actors: dict):
        super().__init__()
        self._actors = actors
        self._last: dict | None = None  # as they told it

    def latest(self) -> RunReport | None:
        self.gather()
        return super().latest()

    def gather(self) -> None:
        """Waits for actors that are at work. Of actors that are gone, what is known already stays."""
        import ray

        try:
            asked = [actor.model_function_runner_get_values.remote(call_of("report")) for actor in self._actors["workers"]]
            told = ray.get(asked)
        except ray.exceptions.RayError as error:
            log.warning("SVG2: Raylight's workers do not answer: %s", str(error).partition("\n")[0])
            return
        reports = {f"GPU {rank}": None if plain is None else RunReport.from_dict(plain) for rank, plain in enumerate(told)}
        marks = [report and (report.seconds, report.sparse_calls) for report in reports.values()]
        merged = merge(reports)
        if merged is not None and marks != self._last:
            self._last = marks
            self.add(merged)


class Telling:
    """Passes on what the first actor says of its run while the run goes on, to the node in the graph; until the node runs again."""

    _by_node: ClassVar[dict[str, "Telling"]] = {}

    def __init__(self, node: str, stats: GatheredStats):
        from ray.util.queue import Queue

        self.stop(node)
        self._by_node[node] = self
        self.queue = Queue(actor_options={"num_cpus": 0})
        self._node, self._stats = node, stats
        threading.Thread(target=self._pass_on, name="svg2-raylight", daemon=True).start()

    @classmethod
    def stop(cls, node: str | None) -> None:
        """End what an earlier run of the node began: its thread, and Ray's actor for its messages."""
        earlier = cls._by_node.pop(node, None)
        if earlier is not None:
            with contextlib.suppress(Exception):  # Ray was ended, and with it the queue
                earlier.queue.shutdown(force=True)

    def _pass_on(self) -> None:
        live = None
        with contextlib.suppress(Exception):  # Ray has ended, or this process does
            while True:
                body = self.queue.get()
                if live is None or (body["state"], body.get("step")) == ("sampling", 1):
                    live = Live(self._node)
                live.forward(self._whole(body) if body["state"] in ("done", "stopped") else body)

    def _whole(self, body: dict) -> dict:
        """A finished run: the first actor's message, with what all of them did."""
        report = self._stats.latest()
        if report is None:
            return body
        told = {reason["name"] for reason in body["reasons"]}
        more = [Reason(name) for name in report.dense_calls if name not in told]
        return {
            **body,
            **{name: getattr(report, name) for name in ("density", "error", "sparse_share", "dense_calls")},
            "blocks": blocks_of(report),
            "reasons": [
                *body["reasons"],
                *({"name": reason.value, "sentence": reason.sentence, "detail": "", "expected": reason.expected} for reason in more),
            ],
        }
