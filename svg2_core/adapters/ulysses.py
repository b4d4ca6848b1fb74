"""SVG2 in place of `ring_attn_fn`: what runs between the collectives of Ulysses attention in yunchang, xFuser and Raylight.

Between them each device sees all tokens of its share of the heads, `[B, N, H / P, D]`. Clusters never cross a head, so each device
answers by itself; where it cannot, it alone computes dense attention, and the collectives never know.

    attention = yunchang.LongContextAttention(attn_type=AttnType.FA)          # or xFuserLongContextAttention
    attention.ring_attn_fn = ulysses.ring_attention(attention.ring_attn_fn, group=attention.ulysses_pg)
    with Evaluation(session, Sequence.of(("video", tokens), multiple=devices), sigma=sigma, conditioning="positive", blocks=40):
        transformer(...)                                                      # whose attention calls `attention`
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed

from ..reasons import Reason, Refusal
from .evaluation import answer_of_the_current, or_dense


def ring_attention(dense: Callable, *, group=None, answer: Callable = answer_of_the_current) -> Callable:
    """A function in place of `dense`, an engine's `ring_attn_fn(q, k, v, dropout_p, softmax_scale, causal, ...)`, which answers
    what SVG2 does not.

    group: the processes that share the heads, None: one process has them all; answer: who answers q, k, v `[B, H, N, D]`, called
    with scale, first_head, dense (which makes the dense answer) and why_not (a `Refusal` where the kind of call is not for SVG2): a
    tensor; else the call is dense, and a `Stopwatch` is stopped then.
    """

    @functools.wraps(dense)
    def attend(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, *more, **named):
        def densely():
            return dense(q, k, v, dropout_p, softmax_scale, causal, *more, **named)

        out = answer(
            *(x.transpose(1, 2) for x in (q, k, v)), scale=softmax_scale, why_not=_why_not(dropout_p, causal, named), dense=densely,
            first_head=0 if group is None else torch.distributed.get_rank(group) * q.shape[2],
        )  # fmt: skip
        return out.transpose(1, 2) if isinstance(out, torch.Tensor) else or_dense(out, densely)

    attend.dense = dense
    return attend


def _why_not(dropout_p: float, causal: bool, named: dict) -> Refusal | None:
    """What a call asks for that sparse attention is not."""
    ring = named.get("group")
    window = named.get("window_size") or (-1, -1)
    devices = torch.distributed.get_world_size(ring) if ring is not None and torch.distributed.is_initialized() else 1
    asked = {
        f"ring attention over {devices} GPUs: none of them sees all keys": devices > 1,
        "text as joint tensors, which are replicated and not part of the sequence": named.get("joint_tensor_key") is not None,
        "causal attention": causal,
        "dropout": dropout_p > 0,
        "attention in a window": tuple(window) != (-1, -1),
        "biases by position": named.get("alibi_slopes") is not None,
        "attention probabilities are asked for": named.get("return_attn_probs"),
        "keys kept from earlier steps": named.get("attn_layer") is not None,
    }
    why = next((what for what, is_so in asked.items() if is_so), None)
    return None if why is None else Refusal(Reason.UNKNOWN_LAYOUT, why)
