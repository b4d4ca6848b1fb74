"""The registry of backends: what each one supports, checked before a call; the choice of one; and which failed.

"auto" takes the first, in the order of preference.py, that supports the call and passed its self-test on that device.
`SVG2_BACKEND` in the environment takes the place of "auto".
"""

import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from ..reasons import Reason, Refusal
from .implementations import NAMES, PREBUILT
from .preference import order_for
from .self_test import self_test
from .triton_versions import too_old


@dataclass(frozen=True)
class Call:
    """What a backend needs to know of a call to say whether it supports it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int


@dataclass(frozen=True)
class Backend:
    """unsupported: None where the backend takes the call, else a Refusal."""

    name: str
    unsupported: Callable[[Call], Refusal | None]


def triton_refusal(device: torch.device) -> Refusal | None:
    """Why the pack's Triton kernels cannot run on a device, whatever they compute; None if they can."""
    if torch.version.hip:
        return Refusal(Reason.UNSUPPORTED_DEVICE, "triton: its configurations are for NVIDIA GPUs")
    capability = None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return Refusal(Reason.UNSUPPORTED_DEVICE, f"triton: needs a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}")
    elif os.environ.get("TRITON_INTERPRET") != "1":
        return Refusal(Reason.UNSUPPORTED_DEVICE, f"triton: needs an NVIDIA GPU, not {device.type}")
    missing = _triton_missing() or (_triton_too_old(capability) if capability else None)
    return Refusal(Reason.NO_BACKEND, f"triton: {missing}") if missing else None


def _triton_unsupported(call: Call) -> Refusal | None:
    refused = triton_refusal(call.device)
    if refused is not None:
        return refused
    dtypes = (torch.float16, torch.bfloat16)
    if call.device.type != "cuda":
        dtypes += (torch.float32,)  # without tensor cores fp32 is slower than dense attention; the interpreter tests in it
    if call.dtype not in dtypes:
        return Refusal(Reason.UNSUPPORTED_DTYPE, f"triton: {call.dtype} is not float16 or bfloat16")
    if call.head_dim > 128:
        return Refusal(Reason.UNSUPPORTED_HEAD_DIM, f"triton: head dimension {call.head_dim} is more than 128")
    return None


@lru_cache(None)
def _triton_missing() -> str | None:
    """Why Triton cannot be imported, with what to do; None if it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"not installed ({_how_to_get_triton()}): {error}"
    return None


def _triton_too_old(capability: tuple[int, int]) -> str | None:
    """Why the Triton that is there, imported by now, must not compile for a GPU, with what to do; None if it may."""
    version = getattr(sys.modules.get("triton"), "__version__", "")
    least = too_old(version, capability)
    if least is None:
        return None
    needed, gpu = ".".join(map(str, least)), ".".join(map(str, capability))
    return f"version {version} is too old for a GPU of compute capability {gpu}, which needs {needed} or newer ({_how_to_get_triton(least)})"


def _how_to_get_triton(least: tuple[int, ...] = (0,)) -> str:
    try:
        from ...cuda import triton_advice
    except ImportError:  # the core alone, without the pack around it
        return "install the one that belongs to this torch"
    return triton_advice.how_to_get(str(torch.__version__), least)


def _torch_unsupported(call: Call) -> Refusal | None:
    if call.device.type not in ("cpu", "cuda"):
        return Refusal(Reason.UNSUPPORTED_DEVICE, f"torch: runs on the CPU and on NVIDIA GPUs, not on {call.device.type}")
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return Refusal(Reason.UNSUPPORTED_DTYPE, f"torch: {call.dtype} is not a floating-point type it computes in")
    return None


def _sdpa_unsupported(call: Call) -> Refusal | None:
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return Refusal(Reason.UNSUPPORTED_DTYPE, f"sdpa: {call.dtype} is not float16, bfloat16 or float32")
    return None


def _prebuilt_unsupported(name: str, call: Call) -> Refusal | None:
    kernels = PREBUILT[name]
    if call.device.type != "cuda":
        return Refusal(Reason.UNSUPPORTED_DEVICE, f"{name}: needs an NVIDIA GPU, not {call.device.type}")
    capability = torch.cuda.get_device_capability(call.device)
    if kernels.capability not in (None, capability):
        needed, found = (".".join(map(str, x)) for x in (kernels.capability, capability))
        return Refusal(Reason.UNSUPPORTED_DEVICE, f"{name}: needs a GPU of compute capability {needed} (Hopper), this one has {found}")
    refused = _triton_unsupported(call)  # all but its near field is Triton's
    if refused is not None:
        return Refusal(refused.reason, f"{name} needs {refused.detail}")
    if call.head_dim not in (64, 128):
        return Refusal(Reason.UNSUPPORTED_HEAD_DIM, f"{name}: head dimension {call.head_dim} is neither 64 nor 128")
    try:
        missing = _prebuilt_missing(kernels.source, call.device)
    except torch.OutOfMemoryError as error:
        return Refusal(Reason.OUT_OF_MEMORY, f"{name}: {error}")
    return Refusal(Reason.NO_BACKEND, f"{name}: {missing}") if missing else None


def _prebuilt_missing(source: str, device: torch.device) -> str | None:
    """Why the prebuilt kernels of a source cannot be loaded on a GPU; None if they can."""
    try:
        from ...cuda import driver
    except ImportError as error:  # the core alone, without the pack around it
        return f"the prebuilt kernels are not part of this installation ({error})"
    return driver.why_not(source, device)


_BACKENDS = {
    **{name: Backend(name, partial(_prebuilt_unsupported, name)) for name in PREBUILT},
    "triton": Backend("triton", _triton_unsupported),
    "sdpa": Backend("sdpa", _sdpa_unsupported),
    "torch": Backend("torch", _torch_unsupported),
}

log = logging.getLogger("svg2")
_retired: dict[str, str] = {}
_tested: set[tuple[str, Call]] = set()
_lock = threading.Lock()


def check_name(requested: str) -> None:
    """Raise ValueError unless `requested` is "auto" or the name of a backend."""
    if requested != "auto" and requested not in NAMES:
        raise ValueError(f"backend: {requested!r} is not accepted; it takes auto, {', '.join(NAMES)}")


def choose(requested: str, call: Call) -> str | Refusal:
    """The name of the backend for `call`: the one `requested`, or for "auto" the fastest that supports it."""
    if requested == "auto":
        requested = os.environ.get("SVG2_BACKEND", "auto")
        if requested not in ("auto", *NAMES):
            return Refusal(Reason.NO_BACKEND, f"SVG2_BACKEND is {requested!r}; it takes auto, {', '.join(NAMES)}")
    candidates = [_BACKENDS[name] for name in (order_for(call.device) if requested == "auto" else (requested,))]
    refusals = []
    for backend in candidates:
        refused = _refusal(backend, call)
        if refused is None:
            return backend.name
        refusals.append(refused)
    # A kernel that failed is worth acting on; else the last backend's, which serves most calls, says why none does.
    return next((found for found in refusals if found.reason is Reason.KERNEL_FAILED), refusals[-1])


def _refusal(backend: Backend, call: Call) -> Refusal | None:
    refused = backend.unsupported(call)
    if refused is None and backend.name not in ("torch", *_retired) and (backend.name, call) not in _tested:
        refused = _self_test(backend.name, call)
    if refused is None and backend.name in _retired:
        refused = Refusal(Reason.KERNEL_FAILED, f"{backend.name}: retired after {_retired[backend.name]}")
    return refused


def _self_test(name: str, call: Call) -> Refusal | None:
    """Run a tiny case before a backend first serves a real call; a wrong result or an error retires it.

    Only a shortage of memory says nothing about the backend: it is tested again at its next call.
    """
    log.info("SVG2: testing the %s kernels on %s; their first use compiles them, which takes a while", name, call.device)
    try:
        self_test(name, call.device, call.dtype, call.head_dim)
    except torch.OutOfMemoryError as error:
        return Refusal(Reason.OUT_OF_MEMORY, f"{name}: {error}")
    except Exception as error:
        retire(name, error)
    with _lock:
        _tested.add((name, call))
    return None


def retire(name: str, error: BaseException) -> None:
    """Stop using a backend for the life of the process; `choose` names the error from now on."""
    with _lock:
        _retired.setdefault(name, f"{type(error).__name__}: {error}")


def retired(name: str) -> str | None:
    """The error for which a backend is out of service, or None."""
    return _retired.get(name)


def reinstate(name: str) -> None:
    """Undo `retire` (for tests and for the Doctor's retry)."""
    with _lock:
        _retired.pop(name, None)
        _tested.difference_update({entry for entry in _tested if entry[0] == name})
