"""Which evaluation of the network runs on this thread. The host runs one thread per GPU."""

import threading

from .model_call import ModelCall

_now = threading.local()


def current() -> ModelCall | None:
    """The evaluation that is open on this thread."""
    return getattr(_now, "call", None)


def set_current(call: ModelCall | None) -> ModelCall | None:
    """Open or close an evaluation on this thread; -> the one that was open."""
    before, _now.call = current(), call
    return before
