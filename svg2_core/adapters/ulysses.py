"""SVG2 in place of `ring_attn_fn`: what runs between the collectives of Ulysses attention in yunchang, xFuser and Raylight.

Between them each device sees all tokens of its share of the heads, `[B, N, H / P, D]`. Clusters never cross a head, so each device
answers by itself; where it cannot, it alone computes dense attention, and the collectives never know.

    attention = yunchang.LongContextAttention(attn_type=AttnType.FA)          # or xFuserLongContextAttention
    attention.ring_attn_fn = ulysses.ring_attention(attention.ring_attn_fn, group=attention.ulysses_pg)
    with Evaluation(session, Sequence.of(("video", tokens), multiple=devices), sigma=sigma):
        transformer(...)                                                      # whose attention calls `attention`
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed

from ..reasons import Reason, Refusal
from .evaluation import answer_of_the_current

# What may stand behind q, k, v without its name.
_IN_ORDER = (
    "dropout_p", "softmax_scale", "causal", "window_size", "alibi_slopes", "deterministic", "return_attn_probs", "group", "attn_type",
    "attn_processor", "attn_layer", "joint_tensor_key",
)  # fmt: skip


def ring_attention(dense: Callable, *, group=None, answer: Callable = answer_of_the_current) -> Callable:
    """A function in place of `dense`, an engine's `ring_attn_fn(q, k, v, dropout_p, softmax_scale, causal, ...)`, which answers
    what SVG2 does not.

    group: the processes that share the heads, None: one process has them all; answer: who answers q, k, v `[B, H, N, D]`, called
    with scale, first_head and why_not (a `Refusal` where the kind of call is not for SVG2): a tensor, or anything else for dense.
    """

    @functools.wraps(dense)
    def attend(q, k, v, *more, **named):  # passed on as they come: what stands at `dense` may look for names
        first_head = 0 if group is None else torch.distributed.get_rank(group) * q.shape[2]
        asked = {**dict(zip(_IN_ORDER, more, strict=False)), **named}
        out = answer(
            *(x.transpose(1, 2) for x in (q, k, v)), scale=asked.get("softmax_scale"), first_head=first_head, why_not=_why_not(asked)
        )
        if isinstance(out, torch.Tensor):
            return out.transpose(1, 2)
        return dense(q, k, v, *more, **named)

    attend.dense = dense
    return attend


def _why_not(call: dict) -> Refusal | None:
    """What a call asks for that sparse attention is not."""
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
    }
    why = next((what for what, is_so in asked.items() if is_so), None)
    return None if why is None else Refusal(Reason.UNKNOWN_LAYOUT, why)
