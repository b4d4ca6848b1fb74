"""Backends of the operations: what each one supports, checked before the call, and which failed.

A backend is a name shared by all operations; an operation has an implementation for each name it lists in its own
`__init__.py`. Later backends join by one entry in `_BACKENDS`, fastest first.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..reasons import Reason


@dataclass(frozen=True)
class Call:
    """What a backend needs to know of a call to say whether it supports it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int


@dataclass(frozen=True)
class Refusal:
    """Why no backend takes a call: the reason to count and the sentence to show."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class Backend:
    """`unsupported` returns None where the backend takes the call, else a Refusal."""

    name: str
    unsupported: Callable[[Call], Refusal | None]


def _torch_unsupported(call: Call) -> Refusal | None:
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return Refusal(Reason.UNSUPPORTED_DTYPE, f"torch: {call.dtype} is not a floating-point type it computes in")
    return None


_BACKENDS = (Backend("torch", _torch_unsupported),)

# Names a user may ask for; the kernels of those not in _BACKENDS are not part of this version.
NAMES = ("cuda", "triton", "torch")

_retired: dict[str, str] = {}
_lock = threading.Lock()


def check_name(requested: str) -> None:
    """Raise ValueError unless `requested` is "auto" or the name of a backend."""
    if requested != "auto" and requested not in NAMES:
        raise ValueError(f"backend: {requested!r} is not accepted; it takes auto, {', '.join(NAMES)}")


def choose(requested: str, call: Call) -> str | Refusal:
    """The name of the backend for `call`: the one `requested`, or for "auto" the fastest that supports it."""
    refusal = Refusal(Reason.NO_BACKEND, f"{requested}: not part of this version")
    for backend in _BACKENDS:
        if requested not in ("auto", backend.name):
            continue
        error = _retired.get(backend.name)
        if error is not None:
            refusal = Refusal(Reason.KERNEL_FAILED, f"{backend.name}: retired after {error}")
            continue
        refused = backend.unsupported(call)
        if refused is None:
            return backend.name
        refusal = refused
    return refusal


def retire(name: str, error: BaseException) -> None:
    """Stop using a backend for the life of the process; `choose` names the error from now on."""
    with _lock:
        _retired.setdefault(name, f"{type(error).__name__}: {error}")


def reinstate(name: str) -> None:
    """Undo `retire` (for tests and for the Doctor's retry)."""
    with _lock:
        _retired.pop(name, None)
