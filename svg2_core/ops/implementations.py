"""Names of backends, and the lookup of an operation's implementation: in each operation's folder the file of the backend's name
(`reference.py` is "torch"; `cuda.py` has all prebuilt kernels). The choice of a backend is registry.py's.
"""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Prebuilt:
    """Kernels of cuda/: from which source, and for the GPUs of which compute capability alone (None: all that they are built for)."""

    source: str
    capability: tuple[int, int] | None = None


PREBUILT = {"cuda": Prebuilt("near_field_fa2"), "cuda_fa3": Prebuilt("near_field_fa3", (9, 0))}
NAMES = (*PREBUILT, "triton", "sdpa", "torch")  # what a user may ask for


def implementation(package: str, backend: str):
    """What implements an operation (its package name) for `backend`: a module, or for prebuilt kernels their launcher; imported at
    first use.

    Raises ValueError for a name that is not in NAMES.
    """
    if backend not in NAMES:
        raise ValueError(f"backend: {backend!r} is not accepted; it takes {', '.join(NAMES)}")
    file = _file(package, backend)
    module = importlib.import_module(file, package)
    return module.LAUNCHERS[backend] if file == ".cuda" else module


def _file(package: str, backend: str) -> str:
    if backend == "torch":
        return ".reference"
    if backend in PREBUILT:  # they are the near field; all else is Triton's
        return ".cuda" if package.endswith(".near_field") else ".triton"
    return f".{backend}"
