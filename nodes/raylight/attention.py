"""Raylight's attention, with SVG2 between its collectives.

Its blocks call an attention of its own, which never asks the host's override. Each of its model modules has one object that shares
the heads out among the GPUs; of that, what runs in between (`ring_attn_fn`) is replaced, once in a process. Outside an evaluation
of a model that SVG2 is hung on, it does what it did.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from ...svg2_core.adapters.evaluation import attend
from ...svg2_core.adapters.ulysses import ring_attention
from ...svg2_core.reasons import Reason, Refusal
from ..patching.block_numbers import block_and_total
from ..patching.host_records import recorded
from ..patching.model_call import ModelCall
from ..patching.now import current
from ..patching.option_keys import RUN
from ..patching.override import call_site
from ..patching.run import Run
from .sequences import find_sequence, grid_of

MODULES = "raylight.diffusion_models."
FUNCTION = "xfuser_optimized_attention"


def replace_attentions() -> None:
    """Put SVG2 between the collectives of every model module that Raylight has loaded; those that have it stay as they are."""
    for attention in _attentions():
        if not getattr(attention.ring_attn_fn, "of_svg2", False):
            attention.ring_attn_fn = ring_attention(attention.ring_attn_fn, group=attention.ulysses_pg, answer=_answer)
            attention.ring_attn_fn.of_svg2 = True


def _attentions() -> Iterator:
    """The objects that share the heads out: what Raylight's attention functions hold on to."""
    for name, module in list(sys.modules.items()):
        function = getattr(module, FUNCTION, None) if name.startswith(MODULES) else None
        held = [] if function is None else inspect.getclosurevars(inspect.unwrap(function)).nonlocals.values()
        yield from (x for x in held if hasattr(x, "ring_attn_fn"))


def _answer(q, k, v, *, scale, first_head: int, why_not: Refusal | None, dense: Callable[[], object]):
    """The answer to q, k, v `[B, H / P, N, D]`, all tokens of a share of the heads; see `ring_attention`."""
    call = current()
    run: Run | None = None if call is None else call.options.get(RUN)
    if run is None:
        return None
    if call.refusal is not None:
        return run.refuse(call.refusal, None)
    sequence = _sequence(call, q, k, v, why_not)
    call.came |= not isinstance(sequence, Refusal) or sequence.reason is not Reason.NOT_VIDEO_SELF_ATTENTION
    if isinstance(sequence, Refusal):
        return run.refuse(sequence, None)
    block, total = block_and_total(call, call.options)
    site = replace(call_site(call, block, total), grid=grid_of(call, _gpus()), first_head=first_head)
    if recorded(q.device):
        return run.refuse(Refusal(Reason.RECORDED), site.label, call.step)
    return attend(run, sequence, q, k, v, site, scale, dense)


def _sequence(call: ModelCall, q, k, v, why_not: Refusal | None):
    if not (q.shape == k.shape == v.shape) or q.shape[0] != call.batch or call.block is None:
        return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)
    if why_not is not None:  # before its length is looked at: in a ring it is that of a part
        return why_not
    return find_sequence(call, _list_of(call), _gpus(), q.shape[2])


def _list_of(call: ModelCall) -> str:
    """The network's list that the running block is in."""
    number = call.block
    for name, blocks in call.blocks.items():
        if number < len(blocks):
            return name
        number -= len(blocks)
    return ""


def _gpus() -> int:
    from xfuser.core.distributed import get_sequence_parallel_world_size

    return get_sequence_parallel_world_size()


def share_conditionings(call: ModelCall) -> None:
    """Whose each batch row is, where Raylight gives each GPU its own conditionings: the host's list of them is still that of all."""
    parallel, run = sys.modules.get("xfuser.core.distributed.parallel_state"), call.options.get(RUN)
    if call.refusal is not None or call.conditionings or getattr(parallel, "_CFG", None) is None:
        return
    of_all = tuple(zip(call.options.get("uuids") or (), call.options.get("cond_or_uncond") or (), strict=False))
    groups = parallel.get_classifier_free_guidance_world_size()
    if len(of_all) * run.batch == call.batch * groups and len(of_all) % groups == 0:
        share = len(of_all) // groups
        first = parallel.get_classifier_free_guidance_rank() * share
        call.conditionings = of_all[first : first + share]
