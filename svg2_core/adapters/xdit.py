"""SVG2 for xDiT's registry of attention functions, which its USP calls between the collectives on `[B, H / P, N, D]`.

    from xfuser.core.distributed import attention_backend as xdit_backends, get_ring_parallel_world_size, get_ulysses_parallel_rank
    registry, name = xdit_backends.ATTENTION_FUNCTION_REGISTRY, xdit_backends.AttentionBackendType.SDPA
    registry[name] = xdit.attention(registry[name], rank=get_ulysses_parallel_rank, ring=get_ring_parallel_world_size)
    with Evaluation(session, Sequence.of(("video", tokens), multiple=devices), sigma=sigma, conditioning="positive", blocks=40):
        transformer(...)                                                      # with xDiT's attention processors
"""

import functools
from collections.abc import Callable

import torch

from ..reasons import Reason, Refusal
from .evaluation import answer_of_the_current, or_dense

_HARMLESS = {"valid_kv_len", "thw"}  # keys that USP has cut by then; the video's size


def attention(dense: Callable, *, rank: Callable[[], int] = lambda: 0, ring: Callable[[], int] = lambda: 1, answer=answer_of_the_current):
    """A function for xDiT's `register_attention_function`, in front of another one, `dense`, which answers what SVG2 does not.

    rank: of this process among those that share the heads; ring: how many processes share the keys (above 1 every call is dense);
    answer: see `ulysses.ring_attention`. -> (out, None): without a logsumexp, which only a ring asks for.
    """

    @functools.wraps(dense)
    @torch.compiler.disable
    def attend(query, key, value, dropout_p=0.0, is_causal=False, attention_kwargs=None):
        make = functools.partial(
            dense, query, key, value, dropout_p=dropout_p, is_causal=is_causal, attention_kwargs=attention_kwargs
        )  # fmt: skip
        out = answer(
            query, key, value, scale=None, dense=make, first_head=rank() * query.shape[1],
            why_not=_why_not(dropout_p, is_causal, attention_kwargs or {}, ring()),
        )  # fmt: skip
        return (out, None) if isinstance(out, torch.Tensor) else or_dense(out, make)

    return attend


def _why_not(dropout_p: float | None, is_causal: bool | None, more: dict, ring: int) -> Refusal | None:
    if ring > 1:
        return Refusal(Reason.UNKNOWN_LAYOUT, f"ring attention over {ring} GPUs: none of them sees all keys")
    if is_causal or dropout_p:
        return Refusal(Reason.UNKNOWN_LAYOUT, "causal attention" if is_causal else "dropout")
    asked = sorted(name for name, value in more.items() if value is not None and name not in _HARMLESS)
    if asked:
        return Refusal(Reason.UNKNOWN_LAYOUT, f"attention_kwargs ask for {', '.join(asked)}")
    return None
