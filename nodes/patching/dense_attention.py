"""What computes the dense calls over video tokens where the user chooses it (input `dense_attention`), and why a choice is not here."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import comfy.ldm.modules.attention as host
import torch

from ...svg2_core.reasons import Reason, Refusal

# Beside auto. The same on every machine: a workflow that was saved on another one opens, and hears at the node what is not here.
NAMES = ("flash", "sage", "int8")

_failed: dict[tuple, str] = {}  # the errors of this process, by name, device type, dtype and head dimension


@dataclass(frozen=True)
class DenseAttention:
    """A choice: it is called, and returns, as the host's own attention functions.

    quantised: its results differ from exact ones, and a model can ask for better; masks: it takes them.
    """

    name: str
    function: Callable
    quantised: bool = False
    masks: bool = False

    def __call__(self, q, k, v, heads, **arguments) -> torch.Tensor:
        return self.function(q, k, v, heads, **arguments)

    def or_else(self, func: Callable, tell: Callable[[str], None]) -> Callable:
        """This choice in the place of the host's `func`, which answers what the choice refuses; `tell` hears why.

        For that, q, k and v are kept until there is an answer, also where the choice could do without them sooner.
        """

        def attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
            arguments = {"mask": mask, "attn_precision": attn_precision, "skip_reshape": skip_reshape,
                         "skip_output_reshape": skip_output_reshape, **kwargs}  # fmt: skip
            out = self.answer(q, k, v, heads, arguments)
            if not isinstance(out, str):
                return out
            tell(out)
            return func(q, k, v, heads, **arguments)

        return attention

    def answer(self, q, k, v, heads: int, arguments: dict) -> torch.Tensor | str:
        """The answer, or why there is none. What has failed once is not tried again on calls of its kind, but for want of memory."""
        if arguments["mask"] is not None and not self.masks:
            return "a mask"
        if self.quantised and arguments.get("low_precision_attention", True) is False:
            return "the model asks for full precision"
        head_dim = q.shape[-1] if arguments["skip_reshape"] else q.shape[-1] // heads
        kind = self.name, q.device.type, q.dtype, head_dim
        if kind in _failed:
            return _failed[kind]
        try:
            return self(q, k, v, heads, **arguments)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            why = f"{q.device.type}, {str(q.dtype).removeprefix('torch.')}, head dimension {head_dim}: {said}"
            if not isinstance(error, torch.OutOfMemoryError):
                _failed[kind] = why
            return why


def forget() -> None:
    """Let what has failed be tried again."""
    _failed.clear()


def find(name: str) -> DenseAttention | Refusal:
    """The choice of that name, or why this machine does not have it."""
    return {"flash": _flash, "sage": _sage, "int8": _int8}[name]()


def _missing(why: str) -> Refusal:
    return Refusal(Reason.NO_BACKEND, why)


def _flash() -> DenseAttention | Refusal:
    function = host.get_attention_function("flash", None)
    return DenseAttention("flash", function) if function else _missing("the package flash-attn is not installed")


def _sage() -> DenseAttention | Refusal:
    """The package itself: the host's function answers what it refuses by another attention, which is known to the log alone."""
    try:
        sageattn = importlib.import_module("sageattention").sageattn
    except ModuleNotFoundError as error:
        what = "is not installed" if error.name == "sageattention" else f"needs {error.name}, which is not installed"
        return _missing(f"the package sageattention {what}")
    except Exception as error:  # a compiled part for another torch, say
        return _missing(f"the package sageattention cannot be loaded ({type(error).__name__}: {error})")
    return DenseAttention("sage", _as_the_hosts(sageattn), quantised=True)


def _as_the_hosts(sageattn: Callable) -> Callable:
    """SageAttention's function in the form of the host's, with the mean of the keys taken off before they are quantised, its default.

    Version 1, whose function has an argument for that, takes it off in place: it gets a copy, for the keys are the model's.
    """
    writes = "smooth_k" in inspect.signature(sageattn).parameters

    def attention(q, k, v, heads, skip_reshape=False, skip_output_reshape=False, scale=None, **_):
        if not skip_reshape:
            q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        k = k.clone() if writes else k
        out = sageattn(q, k, v, tensor_layout="HND" if skip_reshape else "NHD", is_causal=False, sm_scale=scale)
        if bool(skip_reshape) != bool(skip_output_reshape):
            out = out.transpose(1, 2)
        return out if skip_output_reshape else out.flatten(2)

    return attention


def _int8() -> DenseAttention | Refusal:
    """The host's own, of comfy-kitchen. Unlike its others it raises what it cannot do."""
    function = host.get_attention_function("comfy_kitchen_int8", None)
    if function is not None:
        return DenseAttention("int8", function, quantised=True, masks=True)
    if hasattr(host, "COMFY_KITCHEN_INT8_ATTENTION_IS_AVAILABLE"):
        return _missing("comfy-kitchen has no INT8 attention for this machine: it is for NVIDIA GPUs of compute capability 7.5 or newer and some AMD GPUs")
    return _missing("this ComfyUI has no INT8 attention yet; newer ones do")
