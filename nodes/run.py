"""One sampling run: what the node decided, and the state that lives and dies with the run."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..svg2_core.cache import CentroidCache
from ..svg2_core.config import SVG2Config
from ..svg2_core.ops import registry
from ..svg2_core.schedule import Schedule
from ..svg2_core.stats import NOT_FASTER, RunStats, StatsHandle
from .live import Live
from .model_call import ModelCall, open_call

log = logging.getLogger("svg2")


@dataclass(frozen=True)
class Settings:
    """What the node decided.

    backend, preset: as asked for, "auto" or a name; node: its place in the graph, if it has one;
    dense: what computes the dense calls over video tokens in place of the host's own choice.
    """

    config: SVG2Config
    backend: str
    handle: StatsHandle
    preset: str = "auto"
    node: str | None = None
    dense: Callable | None = None


class Run:
    """The mutable state of one sampling run."""

    def __init__(self, settings: Settings, schedule: Schedule, batch: int):
        self.settings = settings
        self.schedule = schedule
        self.batch = batch  # videos sampled together
        self.cache = CentroidCache()
        self.stats = RunStats()
        self.heads_at_a_time: dict[torch.device, int] = {}  # where memory ran short
        self.live = Live(settings.node)

    @torch.compiler.disable
    def model_call(self, network, forward, args, kwargs, options: dict) -> ModelCall:
        """Open one evaluation. Reads the current sigma: the only wait for the device in an evaluation without padding."""
        step = self.schedule.step_of(self.stats.read_with(options["sigmas"].flatten()[0]))
        self.cache.now = step
        self.live.step(step, self.schedule, self.stats)
        return open_call(step, self.schedule.dense_step(step), network, forward, args, kwargs, options, self.batch)

    def finish(self, completed: bool) -> None:
        self.cache.clear()
        try:
            report = self.stats.report(completed, self.effective_settings())
        except Exception:  # after a device fault every read fails; the error that ended the run is the one to show
            log.exception("SVG2: no report of this run")
            self.live.lost()
            return
        self.settings.handle.add(report)
        self.live.end(report, self.schedule.steps, self.stats)
        log.info(report.summary)
        for name in NOT_FASTER:
            if name in self.stats.remarks:
                log.warning("SVG2: %s", self.stats.remarks[name].sentence)

    def effective_settings(self) -> dict[str, object]:
        """What this run goes by, by the names of the node's inputs: knobs at auto resolved, clusters for its longest sequence."""
        backend, tokens = self.stats.backend, self.stats.tokens
        config = self.settings.config.for_backend(backend is None or registry.has_far_field(backend))
        q_clusters, k_clusters = config.cluster_counts(tokens) if tokens else (config.q_clusters, config.k_clusters)
        return {
            "preset": self.settings.preset,
            "q_clusters": q_clusters,
            "k_clusters": k_clusters,
            "density": config.density,
            "top_p": config.top_p if config.density is None else None,
            "warmup_steps": self.schedule.warmup_steps,
            "min_k_ratio": config.min_k_ratio,
            "kmeans_init_iters": config.kmeans_init_iters,
            "kmeans_iters": config.kmeans_iters,
            "end_percent": config.end_percent,
            "dense_blocks": config.dense_blocks,
            "min_tokens": config.min_tokens,
            "compensation": config.compensation,
            "backend": backend or self.settings.backend,
        }
