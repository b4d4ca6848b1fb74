"""One sampling run: what the node decided, and the state that lives and dies with the run."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...svg2_core.cache import CentroidCache
from ...svg2_core.config import SVG2Config
from ...svg2_core.reasons import Reason, Refusal
from ...svg2_core.schedule import Schedule
from ...svg2_core.stats import AT_THE_END, RunStats, StatsHandle
from ..telling.live import Live
from .block_numbers import BlockLists, find_blocks
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
    """The mutable state of one sampling run.

    batch: videos sampled together; blocks: of the network as its model made it; asking: modules with an attention that their
    checkpoint asks for, and that attention.
    """

    def __init__(self, settings: Settings, schedule: Schedule, batch: int, blocks: BlockLists, asking: list[tuple]):
        self.settings = settings
        self.schedule = schedule
        self.batch = batch
        self.blocks = blocks
        self.asking = asking
        self.place = None  # of our override among others' (other_overrides.py)
        self.step = 0  # of the latest evaluation
        self.cache = CentroidCache()
        self.stats = RunStats()
        self.heads_at_a_time: dict[torch.device, int] = {}  # where memory ran short
        self.live = Live(settings.node)

    def __deepcopy__(self, memo) -> "Run":
        """Itself: a node that copies the options while sampling is still in the same run."""
        return self

    @torch.compiler.disable
    def model_call(self, network, forward, args, kwargs, options: dict) -> ModelCall:
        """Open one evaluation. Reads the current sigma: the only wait for the device in an evaluation without padding.

        Where a node evaluates the model by itself and names no sigma, it does so in the step that the sampler is in.
        """
        sigmas = options.get("sigmas")
        if sigmas is not None:
            self.step = self.schedule.step_of(self.stats.read_with(sigmas.flatten()[0]), since=self.step)
        step = self.cache.now = self.step
        self.live.step(step, self.schedule, self.stats)
        call = open_call(step, self.schedule.dense_step(step), network, forward, args, kwargs, options, self.batch)
        if call.refusal is None:
            call.blocks, call.classes = find_blocks(network, self.blocks), self.blocks.classes
        return call

    def missed(self, call: ModelCall) -> None:
        """Count, at the end of an evaluation, the blocks whose attention did not come by."""
        call.leave()
        for block in call.missed:
            self.refuse(Refusal(Reason.NEVER_CAME), str(block), call.step)

    def refuse(self, refusal: Refusal, block: str | None, step: int | None = None) -> Refusal:
        """Count a dense call; the first of each reason the user should know about goes to the log."""
        if self.stats.dense_call(refusal.reason, block, refusal.detail, step) and not refusal.reason.expected:
            log.warning("SVG2: dense attention: %s", self.stats.notices[refusal.reason])
        return refusal

    def remark(self, what: str, sentence: str, **values: str) -> None:
        """Note what runs otherwise than the settings ask or the user hopes; the first time it goes to the log as well."""
        if self.stats.remark(what, sentence, **values):
            log.warning("SVG2: %s", sentence)

    def finish(self, completed: bool) -> None:
        self.cache.clear()
        try:
            if completed and self.schedule.steps and self.stats.explain_none():
                self.refuse(Refusal(Reason.NEVER_CAME), None)
            report = self.stats.report(completed, self.effective_settings())
        except Exception:  # after a device fault every read fails; the error that ended the run is the one to show
            log.exception("SVG2: no report of this run")
            self.live.lost()
            return
        self.settings.handle.add(report)
        self.live.end(report, self.schedule.steps, self.stats)
        log.info(report.summary)
        for name in AT_THE_END:
            if name in self.stats.remarks:
                log.warning("SVG2: %s", self.stats.remarks[name].sentence)

    def effective_settings(self) -> dict[str, object]:
        """What this run goes by, by the names of the node's inputs: knobs at auto resolved, clusters for its longest sequence."""
        backend, tokens = self.stats.backend, self.stats.tokens
        config = self.settings.config
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
