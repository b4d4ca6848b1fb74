"""The attention override: every attention call of the model comes here and is answered sparsely, or densely with a reason."""

import threading
from collections.abc import Callable

import comfy.ldm.modules.attention
import torch

from ...svg2_core.reasons import Reason, Refusal
from ...svg2_core.session import COMPARABLE, CallSite
from ...svg2_core.stopwatch import timed
from . import compiled
from .block_numbers import block_and_total
from .host_records import recorded
from .layouts import family_of, find_layout
from .model_call import ModelCall
from .option_keys import CALL, RUN
from .run import Run, Settings

_thread = threading.local()  # answering: a dense call is on its way through the overrides below ours


class Override:
    """The attention override. Dense calls go to `previous`, the override that was there before, or to the host.

    beneath: what comes after this one where `previous` calls an override of ours in turn, which it found there before.
    """

    def __init__(self, settings: Settings, previous: Callable | None, beneath: Callable | None):
        self.settings = settings
        self.previous = previous
        self.beneath = beneath

    def __deepcopy__(self, memo) -> "Override":
        """Itself: what it holds for a run is looked up by the call."""
        return self

    def __call__(self, func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                 skip_output_reshape=False, **kwargs):  # fmt: skip
        arguments = {"mask": mask, "attn_precision": attn_precision, "skip_reshape": skip_reshape,
                     "skip_output_reshape": skip_output_reshape, **kwargs}  # fmt: skip
        if torch.compiler.is_compiling() and compiled.serves(q, k, v, arguments):
            return compiled.attention(func, q, k, v, heads, arguments)
        return self.answer(func, (q, k, v), heads, arguments)

    def container_function(self, q, k, v, heads, **arguments):
        """What newer hosts call with q, k, v in containers, whose tensors are freed as soon as they are taken out and used."""
        return self.answer(comfy.ldm.modules.attention.optimized_attention, (q, k, v), heads, arguments)

    @torch.compiler.disable
    def answer(self, func: Callable, qkv: tuple, heads: int, arguments: dict):
        """The answer to a call of the host's attention function `func`. qkv: tensors, or the host's containers of them."""
        options = arguments.get("transformer_options") or {}
        run: Run | None = options.get(RUN)
        call: ModelCall | None = options.get(CALL)
        if run is None or _answering():
            return self._dense(func, qkv, heads, arguments)
        out = sparse_answer(run, call, options, qkv, heads, arguments)
        comparable = not isinstance(out, Refusal) or out.reason in COMPARABLE
        if call is not None and call.preferred is not None and self.previous is None:
            func = call.preferred  # the checkpoint's own; the host gives it up where there is an override
        if comparable and run.settings.dense is not None:
            func = _chosen(run, func)
        if isinstance(out, Refusal):
            watch = run.stats.dense_watch(call.device) if comparable and call is not None else None
            return timed(watch, lambda: self._dense(func, qkv, heads, arguments))
        run.compare(call.device, call.step, lambda: self._dense(func, qkv, heads, arguments))
        return out if arguments.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    def _dense(self, func, qkv, heads, arguments):
        below = self.beneath if _answering() else self.previous
        if below is None:
            return func(*_for(func, qkv), heads, **arguments)
        before, _thread.answering = _answering(), True
        try:
            if hasattr(below, "container_function") and not isinstance(qkv[0], torch.Tensor):
                return below.container_function(*qkv, heads, **arguments)
            return below(func, *_tensors(qkv), heads, **arguments)
        finally:
            _thread.answering = before


def _chosen(run: Run, func: Callable) -> Callable:
    """What the user chose for dense calls over video tokens; the host's `func` answers what that refuses, and a notice says so."""
    name = run.settings.dense.name

    def tell(why: str) -> None:
        sentence = f"dense_attention {name} did not take some dense calls ({why}): they ran as at auto"
        run.remark("dense_attention_refused", sentence, name=name, why=why)

    return run.settings.dense.or_else(func, tell)


def _answering() -> bool:
    return getattr(_thread, "answering", False)


def _for(func: Callable, qkv: tuple) -> tuple:
    """Containers where the host's function takes them, else what is in them."""
    return qkv if hasattr(func, "container_function") else _tensors(qkv)


def _tensors(qkv: tuple) -> tuple:
    """Out of their containers, which then hold them no longer."""
    return tuple(x if isinstance(x, torch.Tensor) else x.take() for x in qkv)


def sparse_answer(run: Run, call: ModelCall | None, options: dict, qkv: tuple, heads: int, arguments: dict):
    """The sparse answer `[B, H, N, D]`, or why not. Holds no tensor of the inputs when it returns."""
    refusal = not_a_candidate(run, call, arguments)
    if refusal is not None:
        return refusal
    q, k, v = (x if isinstance(x, torch.Tensor) else x.peek() for x in qkv)
    if not arguments.get("skip_reshape"):
        q, k, v = (_split_heads(x, heads) for x in (q, k, v))
    return sparse_or_refusal(run, call, options, q, k, v, arguments.get("mask"), arguments.get("scale"))


def _split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, N, H * D]` as a `[B, H, N, D]` view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def not_a_candidate(run: Run, call: ModelCall | None, kwargs: dict) -> Refusal | None:
    """What is known not to be for SVG2 before anyone looks at its tensors."""
    if call is None:
        return run.refuse(Refusal(Reason.UNKNOWN_LAYOUT, "the model does not announce its evaluations"), None)
    if call.refusal is not None:
        return run.refuse(call.refusal, None)
    if kwargs.get("enable_gqa"):
        call.came = True
        return run.refuse(Refusal(Reason.UNKNOWN_LAYOUT, "fewer key heads than query heads"), None)
    return None


def sparse_or_refusal(run: Run, call: ModelCall, options: dict, q, k, v, mask, scale) -> torch.Tensor | Refusal:
    """Answer a call of q, k, v `[B, H, N, D]` sparsely, or count why not."""
    layout = find_layout(call, q, k, v, mask)
    call.came |= not isinstance(layout, Refusal) or layout.reason is not Reason.NOT_VIDEO_SELF_ATTENTION
    if isinstance(layout, Refusal):
        return run.refuse(layout, None)
    block, total = block_and_total(call, options)
    if block is None:
        return run.refuse(Refusal(Reason.UNKNOWN_LAYOUT, "it cannot be told which block runs"), None)
    site = call_site(call, block, total, whole=layout.queries is None)
    if recorded(q.device):
        return run.refuse(Refusal(Reason.RECORDED), site.label, call.step)

    shares = site.part is not None and family_of(call.network).shared_keys
    of, known = call.part_keys or (None, None)
    if not shares or of != block or k.shape[2] == layout.video_len:  # the first part: its frame has no other keys (layouts.py)
        known = None
    call.part_keys = None
    answer = run.attend(q, k, v, layout, site, scale=scale, keys=known)
    if isinstance(answer, Refusal):
        return answer
    call.part_keys = (block, answer.keys) if shares else None
    return answer.out


def call_site(call: ModelCall, block: int, total: int | None, whole: bool = True) -> CallSite:
    """Where an attention over the video, or over a part of it, comes from; and it is counted."""
    nth = call.seen.get((block, whole), 0)
    call.seen[block, whole] = nth + 1
    return CallSite(call.step, block, total, nth, tuple(call.rows()), call.window, None if whole else nth, call.grid)
