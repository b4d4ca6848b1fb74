"""The override inside torch.compile: one opaque operator, so that it neither breaks the graph nor is a step's choice frozen in it.

What an operator cannot take (the host's function, the options) is found when it runs: the function by its name, the options by
the evaluation that is open on the thread.
"""

import sys
import zlib

import torch

from .now import current
from .option_keys import OVERRIDE, TOP

# A copy of this pack under another name has an operator of its own.
_NAME = f"attention_{zlib.crc32(__name__.encode()):08x}"
# With CUDA graphs the operator must stay outside of them; where torch cannot be told so, the graph breaks instead.
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
_KNOWN = frozenset({"mask", "attn_precision", "skip_reshape", "skip_output_reshape", "scale", "transformer_options", "_inside_attn_wrapper"})


def serves(q, k, v, arguments: dict) -> bool:
    """Whether the operator can take a call."""
    tensors = isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    return _UNSAFE is not None and tensors and not torch.is_grad_enabled() and all(name in _KNOWN for name in arguments)


def attention(func, q, k, v, heads: int, arguments: dict) -> torch.Tensor:
    """The override's answer to a call of the host's `func`, given when the graph runs."""
    where = f"{func.__module__}:{func.__name__}"
    return _operator(
        q, k, v, arguments["mask"], heads, arguments["skip_reshape"], arguments["skip_output_reshape"],
        arguments["attn_precision"], arguments.get("scale"), where,
    )  # fmt: skip


def _answer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, heads: int, skip_reshape: bool,
    skip_output_reshape: bool, attn_precision: torch.dtype | None, scale: float | None, where: str,
) -> torch.Tensor:  # fmt: skip
    call = current()
    arguments = {"mask": mask, "attn_precision": attn_precision, "skip_reshape": skip_reshape,
                 "skip_output_reshape": skip_output_reshape, "_inside_attn_wrapper": True}  # fmt: skip
    if scale is not None:
        arguments["scale"] = scale
    func, override = _function(where), None
    if call is not None:
        arguments["transformer_options"] = call.options
        override = call.options.get(TOP) or call.options.get(OVERRIDE)
    if hasattr(override, "answer"):
        out = override.answer(func, (q, k, v), heads, arguments)
    else:
        out = func(q, k, v, heads, **arguments)
    # An operator's result is its own, in one piece.
    return out.clone() if any(out.data_ptr() == x.data_ptr() for x in (q, k, v)) else out.contiguous()


def _function(where: str):
    """The host's attention function of that name, without its wrapper: that would ask for the override again."""
    module, _, name = where.partition(":")
    function = getattr(sys.modules[module], name)
    return getattr(function, "__wrapped__", function)


def _shape(q, k, v, mask, heads, skip_reshape, skip_output_reshape, attn_precision, scale, where):
    batch, tokens = q.shape[0], q.shape[2] if skip_reshape else q.shape[1]
    width = v.shape[-1] if skip_reshape else v.shape[-1] // heads
    return q.new_empty((batch, heads, tokens, width) if skip_output_reshape else (batch, tokens, heads * width))


if _UNSAFE is not None:
    _operator = torch.library.custom_op(f"svg2::{_NAME}", _answer, mutates_args=(), tags=(_UNSAFE,))
    _operator.register_fake(_shape)
