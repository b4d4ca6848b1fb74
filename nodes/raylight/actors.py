"""Raylight's actors, from the server's process: sending them work, and gathering what they tell.

An actor runs what it is sent on its own ModelPatcher. This pack cannot be imported there by name, so what is sent loads it from its
folder, once in an actor's process.
"""

import contextlib
import importlib.util
import logging
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import folder_paths

from ...svg2_core.merged_report import merge
from ...svg2_core.reasons import Reason
from ...svg2_core.stats import RunReport, StatsHandle
from ..telling.live import Live, blocks_of, reason_entry, remarks

log = logging.getLogger("svg2")

FOLDER = Path(__file__).resolve().parents[2]
ALIAS = "svg2_of_raylight"  # the pack's name inside an actor
NOT_INSTALLED = "Raylight is not installed here: SVG2SparseAttentionRay serves Raylight's workers alone; SVG2 Sparse Attention serves one GPU"


def is_installed() -> bool:
    """Whether Raylight is installed: loaded already, or in a folder beside this pack, which the host may load after it."""
    beside = (Path(folder).glob("*/src/raylight/__init__.py") for folder in folder_paths.get_folder_paths("custom_nodes"))
    names = [file.parents[2].name for files in beside for file in files]
    return importlib.util.find_spec("raylight") is not None or any(not name.endswith(".disabled") for name in names)


def remote_call(name: str, folder: Path = FOLDER, **values) -> Callable:
    """A function of a model to send to an actor: worker.py's of that name, with those values.

    Made inside another one, so that it travels by value: by name nobody would find it there.
    """
    folder, folder_name, name_there = str(folder), folder.name, ALIAS  # its name apart: a path of another system says nothing there

    def call(model):
        import importlib
        import sys
        import types
        from pathlib import Path

        if name_there not in sys.modules:
            # On another machine of a cluster Raylight puts ComfyUI's folder where its process runs.
            places = [Path(folder), Path.cwd() / "custom_nodes" / folder_name]
            found = next((place for place in places if (place / "svg2_core").is_dir()), None)
            if found is None:
                raise ValueError(f"SVG2 is not on this worker's machine: there is no {places[0]} and no {places[1]}")
            for part in ("", ".nodes"):  # as packages alone: the nodes' own files want a server
                package = sys.modules[name_there + part] = types.ModuleType(name_there + part)
                package.__path__ = [str(found / part.removeprefix("."))]
        return getattr(importlib.import_module(f"{name_there}.nodes.raylight.worker"), name)(model, **values)

    return call


def parallelism(actors: dict) -> dict:
    """What Raylight was started with: `ulysses_degree`, `ring_degree` and others, by its own names."""
    import ray

    return ray.get(actors["workers"][0].get_parallel_dict.remote())


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
    """SVG2_STATS of a node's runs on several GPUs: asks the actors, and keeps what they last told. GPUs are numbered as Raylight's workers."""

    def __init__(self, actors: dict):
        super().__init__()
        self.token = uuid.uuid4().hex
        self._actors = actors
        self._run = 0  # the number of the latest run that is known
        self._gathering = threading.Lock()

    def latest(self) -> RunReport | None:
        self.gather()
        return super().latest()

    def gather(self) -> None:
        """Waits for actors that are at work. Where they are gone, what is known already stays."""
        import ray

        if not ray.is_initialized():  # it was ended; to ask an actor would start another one
            return
        with self._gathering:
            try:
                asked = [actor.model_function_runner_get_values.remote(remote_call("report", token=self.token)) for actor in self._actors["workers"]]
                told = ray.get(asked)
            except Exception as error:  # of many kinds: actors that were ended, or are of a Ray before this one
                log.warning("SVG2: Raylight's workers do not answer: %s", str(error).partition("\n")[0])
                return
            run = max(number for number, _ in told)
            reports = {
                f"GPU {rank}": RunReport.from_dict(plain) if plain is not None and number == run else None
                for rank, (number, plain) in enumerate(told)
            }
            merged = merge(reports)
            if merged is not None and run > self._run:
                self._run = run
                self.add(merged)


class LiveRelay:
    """Passes on what the first actor says of a run while the run goes on, to the node in the graph; until these actors get another one."""

    _by_actor: ClassVar[dict[str, "LiveRelay"]] = {}

    def __init__(self, actors: dict, node: str, stats: GatheredStats):
        from ray.util.queue import Queue

        self.stop(actors)
        self._by_actor[_name_of(actors)] = self
        self.queue = Queue(maxsize=1024, actor_options={"num_cpus": 0})
        self._node, self._stats = node, stats
        threading.Thread(target=self._pass_on, name="svg2-raylight", daemon=True).start()

    @classmethod
    def stop(cls, actors: dict) -> None:
        """End what an earlier node began for these actors: its thread, and Ray's actor for its messages."""
        earlier = cls._by_actor.pop(_name_of(actors), None)
        if earlier is not None:
            with contextlib.suppress(Exception):  # Ray was ended, and with it the queue
                earlier.queue.shutdown(force=True)

    def _pass_on(self) -> None:
        live = None
        while True:
            try:
                body = self.queue.get()
            except Exception:  # the queue was shut down, or Ray was
                return
            try:
                if live is None or (body["state"], body.get("step")) == ("sampling", 1):
                    live = Live(self._node)
                live.forward(self._whole(body) if body["state"] in ("done", "stopped") else body)
            except Exception:
                log.exception("SVG2: no live status of this run")

    def _whole(self, body: dict) -> dict:
        """A finished run: the first actor's message, with what all of them did."""
        report = self._stats.latest()
        if report is None:
            return body
        told = {reason["name"] for reason in body["reasons"]}
        more = [Reason(name) for name in report.dense_calls if name not in told]
        return {
            **body,
            **{name: getattr(report, name) for name in ("density", "error", "sparse_share", "dense_calls", "tokens", "backend")},
            "state": "done" if report.completed else "stopped",
            "blocks": blocks_of(report),
            "remarks": remarks(report.remarks),
            "reasons": [
                *body["reasons"],
                *map(reason_entry, more),
            ],
        }


def _name_of(actors: dict) -> str:
    return str(getattr(actors["workers"][0], "_actor_id", ""))
