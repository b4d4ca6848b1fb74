"""SVG2 in place of `ring_attn_fn`: what runs between the collectives of Ulysses attention in yunchang, xFuser and Raylight.

Between them each device sees all tokens of its share of the heads, `[B, N, H / P, D]`. Clusters never cross a head, so each device
answers by itself; where it cannot, it alone computes dense attention, and the collectives never know.

    attention = yunchang.LongContextAttention(attn_type=AttnType.FA)          # or xFuserLongContextAttention
    attention.ring_attn_fn = ulysses.ring_attention(attention.ring_attn_fn, group=attention.ulysses_pg)
    with Evaluation(session, Sequence.of(("video", tokens), multiple=devices), sigma=sigma, conditioning="positive", blocks=40):
        transformer(...)                                                      # whose attention calls `attention`
"""

import functools
import threading
from collections.abc import Callable

import torch
import torch.distributed

from ..reasons import Reason, Refusal
from .evaluation import answer_of_the_current, or_dense

_IN_ORDER = ("dropout_p", "softmax_scale", "causal")  # what engines agree on, of what may stand behind q, k, v without its name
_nested = threading.local()


def ring_attention(dense: Callable, *, group=None, answer: Callable = answer_of_the_current) -> Callable:
    """A function in place of `dense`, an engine's `ring_attn_fn(q, k, v, dropout_p, softmax_scale, causal, ...)`, which answers
    what SVG2 does not.

    group: the processes that share the heads, None: one process has them all; answer: who answers q, k, v `[B, H, N, D]`, called
    with scale, first_head, dense (which makes the dense answer) and why_not (a `Refusal` where the kind of call is not for SVG2): a
    tensor; else the call is dense, and a `Stopwatch` is stopped then.
    """

    def densely(*args, **named):
        before, _nested.now = getattr(_nested, "now", False), True
        try:
            return dense(*args, **named)
        finally:
            _nested.now = before

    @functools.wraps(dense)
    @torch.compiler.disable
    def attend(q, k, v, *more, **named):  # passed on as they come: what stands at `dense` may look for names
        if getattr(_nested, "now", False):  # somebody has put us in once more, around what holds us already
            return dense(q, k, v, *more, **named)
        asked = {**dict(zip(_IN_ORDER, more, strict=False)), **named}
        make = functools.partial(densely, q, k, v, *more, **named)
        out = answer(
            *(x.transpose(1, 2) for x in (q, k, v)), scale=asked.get("softmax_scale"), dense=make,
            why_not=_why_not(asked, unnamed=len(more) > len(_IN_ORDER)),
            first_head=0 if group is None else torch.distributed.get_rank(group) * q.shape[2],
        )  # fmt: skip
        return out.transpose(1, 2) if isinstance(out, torch.Tensor) else or_dense(out, make)

    attend.dense = dense
    return attend


def _why_not(call: dict, unnamed: bool = False) -> Refusal | None:
    """What a call asks for that sparse attention is not. unnamed: there are arguments whose meaning differs among engines."""
    ring = call.get("group")
    window = call.get("window_size") or (-1, -1)
    devices = torch.distributed.get_world_size(ring) if ring is not None and torch.distributed.is_initialized() else 1
    asked = {
        f"ring attention over {devices} GPUs: none of them sees all keys": devices > 1,
        "text as joint tensors, which are replicated and not part of the sequence": call.get("joint_tensor_key") is not None,
        "causal attention": call.get("causal"),
        "dropout": call.get("dropout_p"),
        "attention in a window": tuple(window) != (-1, -1),
        "biases by position": call.get("alibi_slopes") is not None,
        "attention probabilities are asked for": call.get("return_attn_probs"),
        "keys kept from earlier steps": call.get("attn_layer") is not None,
        "capped logits": call.get("softcap"),
        "quantised queries, keys or values": any(call.get(f"{x}_descale") is not None for x in "qkv"),
        "arguments without their names": unnamed,
    }
    why = next((what for what, is_so in asked.items() if is_so), None)
    return None if why is None else Refusal(Reason.UNKNOWN_LAYOUT, why)
