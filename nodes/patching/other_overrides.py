"""Our override among those of other nodes: who serves the video where several want to.

One that was there before ours gets our dense calls. One that was added after ours would serve every call first: ours is put on top
of it for the length of each evaluation, so that no node displaces it silently. But a node that puts itself back on top at each
step (another sparse attention) has its way where it was added last; a notice tells of the other. Neither is ever put upon the
other twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

from comfy.patcher_extension import CallbacksMP

from .option_keys import OVERRIDE, TOP
from .override import Override
from .run import Run


@dataclass(frozen=True)
class Place:
    """beneath: the override that was there before ours; above: the one added after it. insisting: which of the two puts itself
    back on top at each step."""

    beneath: Callable | None
    above: Callable | None
    insisting: tuple[Callable, ...]


def take_place(beneath: Callable | None, patcher, options: dict) -> Place:
    """At the start of a run: look who else is there, and take ours out of the run's own options; `put_on_top` brings it back."""
    top = options.get(OVERRIDE)
    above = None if top is None or isinstance(top, Override) else top
    if above is None:
        options.pop(OVERRIDE, None)
        if beneath is not None:
            options[OVERRIDE] = beneath
    modules = {getattr(callback, "__module__", None) for callback in patcher.get_all_callbacks(CallbacksMP.ON_PREPARE_STATE)}
    insisting = tuple(x for x in (beneath, above) if x is not None and getattr(x, "__module__", type(x).__module__) in modules)
    return Place(beneath, above, insisting)


def put_on_top(run: Run, place: Place, options: dict) -> None:
    """At the start of an evaluation, in its own options."""
    current = options.get(OVERRIDE)
    if isinstance(current, Override):  # another node evaluates with options from before the run
        options[TOP] = current
        return
    if place.above is not None and place.above in place.insisting:
        options[TOP] = Override(run.settings, place.beneath, place.beneath)
        _remark(
            run, "override_above", place.above,
            "another node's attention ({name}) was added after SVG2 and sees every call first: what it answers itself does not "
            "come to SVG2. If it is sparse too, keep one of the two",
        )  # fmt: skip
        return
    options[OVERRIDE] = options[TOP] = Override(run.settings, current, place.beneath)
    if place.beneath in place.insisting:
        _remark(
            run, "override_below", place.beneath,
            "another node ({name}) puts its attention on top at each step: SVG2 was added after it and answers the video's "
            "calls; that node gets the dense ones. If it is sparse too, keep one of the two",
        )  # fmt: skip


def _remark(run: Run, what: str, other: Callable, sentence: str) -> None:
    name = name_of(other)
    run.remark(what, sentence.format(name=name), name=name)


def name_of(override: Callable) -> str:
    """Where another node's override comes from, for people."""
    module = getattr(override, "__module__", None) or type(override).__module__
    name = getattr(override, "__qualname__", None) or type(override).__qualname__
    module = module.replace("\\", "/").rpartition("custom_nodes/")[2]
    return f"{module}.{name.partition('.<locals>')[0]}"
