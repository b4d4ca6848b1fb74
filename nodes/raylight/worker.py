"""What runs inside Raylight's actors: each hangs SVG2 on its own copy of the model, and tells what came of it."""

from collections import OrderedDict
from typing import ClassVar

import torch
from comfy.patcher_extension import WrappersMP

from ...svg2_core.stats import StatsHandle
from ..patching.knobs import resolve
from ..patching.layouts import preset_family, uncompiled
from ..patching.now import current
from ..patching.patch import apply_patch, remove_patch
from ..patching.run import Settings
from ..telling.live import Live
from .attention import replace_attentions, share_conditionings

KEY = "svg2_raylight"
_HEADS = ("num_heads", "num_attention_heads")  # as networks, or their parameters, name the number of theirs


class Patches:
    """What the patches of this process' models have done, by the token of the node that sent each."""

    KEPT = 8
    _by_token: ClassVar[OrderedDict[str, "PatchStats"]] = OrderedDict()

    @classmethod
    def of(cls, token: str) -> "PatchStats":
        if token not in cls._by_token:
            cls._by_token[token] = PatchStats()
        while len(cls._by_token) > cls.KEPT:
            cls._by_token.popitem(last=False)
        return cls._by_token[token]


class PatchStats(StatsHandle):
    """The reports of one patch's runs, each with its number: the same on all GPUs."""

    def __init__(self):
        super().__init__()
        self.begun = 0
        self.reported = 0  # the number of the latest report's run

    def add(self, report) -> None:
        super().add(report)
        self.reported = self.begun


class LiveFromActor(Live):
    """Messages of a run that go to the server's process, by a queue; to nobody without one."""

    def __init__(self, queue):
        super().__init__(None)
        self._queue = queue
        self._sent = None  # the last message on its way
        self._header = None if queue is None else {}  # that is: somebody listens

    def _send(self, body: dict) -> None:
        if self._header is None:
            return
        import ray

        if self._sent is not None:  # long since; only of two messages at once the second may overtake
            ray.wait([self._sent], timeout=5)
        self._sent = self._queue.actor.put_nowait.remote(body)  # sampling does not wait for it to arrive


def patch(model, *, token: str, preset: str, backend: str, knobs: dict, gpus: int, queue=None):
    """The actor's model with SVG2; an earlier SVG2 is replaced. token: of the node that asks; gpus: that share the heads.

    Raises ValueError in a sentence for people where this model cannot be served so.
    """
    if model is None:
        raise ValueError("ray_actors: Raylight's workers hold no model yet; place the node behind Raylight's model loader")
    heads = _heads_of(model.get_model_object("diffusion_model"))
    if heads is not None and heads % gpus:
        raise ValueError(f"ray_actors: {heads} attention heads cannot be shared out evenly among {gpus} GPUs (ulysses_degree)")
    stats = Patches.of(token)

    def live() -> LiveFromActor:  # once for each run
        stats.begun += 1
        return LiveFromActor(queue)

    model = apply_patch(model, Settings(resolve(preset_family(model), preset, **knobs), backend, stats, preset, live=live))
    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _with_attentions)
    return model


def unpatch(model):
    """The actor's model as it was before SVG2."""
    if model is None:
        return None
    model = remove_patch(model)
    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    return model


def report(model, *, token: str) -> tuple[int, dict | None]:
    """How many runs that node's patch has begun here, and the last one's report as plain values and, for the picture, tensors; None if
    it has none, yet or for an error."""
    stats = Patches.of(token)
    latest = stats.latest() if stats.reported == stats.begun else None
    return stats.begun, latest and {**latest.to_dict(), "overlays": {name: x.cpu() for name, x in latest.overlays.items()}}


def _with_attentions(executor, *args, **kwargs):
    """Raylight loads a model's module with the model itself, so that its attention is there at an evaluation and not before."""
    replace_attentions()
    call = current()
    if call is not None:
        share_conditionings(call)
    return executor(*args, **kwargs)


# Not recursive: only this frame must not be traced.
_with_attentions = torch.compiler.disable(_with_attentions, recursive=False)


def _heads_of(network) -> int | None:
    network = uncompiled(network)
    sources = network, getattr(network, "params", None)
    return next((heads for source in sources for name in _HEADS if isinstance(heads := getattr(source, name, None), int)), None)
