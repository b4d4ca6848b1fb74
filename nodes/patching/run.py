"""One sampling run in ComfyUI: what the node decided, and the session with what the host alone knows."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import torch

from ...svg2_core.config import SVG2Config
from ...svg2_core.reasons import Reason, Refusal
from ...svg2_core.schedule import Schedule
from ...svg2_core.session import Session, is_out_of_memory
from ...svg2_core.stats import AT_THE_END, StatsHandle
from ..telling.live import Live
from .block_numbers import BlockLists, find_blocks
from .host_records import pause_malloc_graph
from .model_call import ModelCall, open_call

log = logging.getLogger("svg2")


@dataclass(frozen=True)
class Settings:
    """What the node decided.

    backend, preset: as asked for, "auto" or a name; node: its place in the graph, if it has one;
    dense: what computes the dense calls over video tokens in place of the host's own choice; live: makes what tells of a run while
    it goes on, None: the messages of that node in the graph.
    """

    config: SVG2Config
    backend: str
    handle: StatsHandle
    preset: str = "auto"
    node: str | None = None
    dense: Callable | None = None
    live: Callable[[], Live] | None = None


def memory_ran_short(error: Exception) -> bool:
    """As the host knows it, which takes faults of the driver for one too, or on the CPU."""
    host_knows = getattr(comfy.model_management, "is_oom", is_out_of_memory)
    return host_knows(error) or is_out_of_memory(error)


class Run(Session):
    """The mutable state of one sampling run.

    batch: videos sampled together; blocks: of the network as its model made it; asking: modules with an attention that their
    checkpoint asks for, and that attention.
    """

    def __init__(self, settings: Settings, schedule: Schedule, batch: int, blocks: BlockLists, asking: list[tuple]):
        super().__init__(schedule, backend=settings.backend, preset=settings.preset, out_of_memory=memory_ran_short, keeping=pause_malloc_graph)
        self.settings = settings
        self.batch = batch
        self.blocks = blocks
        self.asking = asking
        self.place = None  # of our override among others' (other_overrides.py)
        self.live = settings.live() if settings.live else Live(settings.node)

    def __deepcopy__(self, memo) -> "Run":
        """Itself: a node that copies the options while sampling is still in the same run."""
        return self

    @torch.compiler.disable
    def model_call(self, network, forward, args, kwargs, options: dict) -> ModelCall:
        """Open one evaluation. Reads the current sigma: the only wait for the device in an evaluation without padding.

        Where a node evaluates the model by itself and names no sigma, it does so in the step that the sampler is in.
        """
        sigmas = options.get("sigmas")
        step = self.at(None if sigmas is None else sigmas.flatten()[0])
        self.live.step(step, self.schedule, self.stats)
        call = open_call(step, network, forward, args, kwargs, options, self.batch)
        if call.refusal is None:
            call.blocks, call.classes = find_blocks(network, self.blocks), self.blocks.classes
        return call

    def missed(self, call: ModelCall) -> None:
        """Count, at the end of an evaluation, the blocks whose attention did not come by."""
        call.leave()
        for block in call.missed:
            self.refuse(Refusal(Reason.NEVER_CAME), str(block), call.step)

    def finish(self, completed: bool) -> None:
        try:
            report = self.report(completed)
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
