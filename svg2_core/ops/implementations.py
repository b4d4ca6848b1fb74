"""Where an operation finds its implementation: a backend is a name that all operations share, and in each operation's folder the
file of that name (`reference.py` is "torch"). Who chooses the backend: registry.py.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Prebuilt:
    """Kernels of cuda/: from which source, and for the GPUs of which compute capability alone (None: all that they are built for)."""

    source: str
    capability: tuple[int, int] | None = None


PREBUILT = {"cuda": Prebuilt("near_field_fa2"), "cuda_fa3": Prebuilt("near_field_fa3", (9, 0))}
NAMES = (*PREBUILT, "triton", "sdpa", "torch")  # what a user may ask for


def implementation(package: str, backend: str) -> ModuleType:
    """The module of an operation (its package name) that implements `backend`; imported at first use.

    Raises ValueError for a name that is not in NAMES.
    """
    if backend not in NAMES:
        raise ValueError(f"backend: {backend!r} is not accepted; it takes {', '.join(NAMES)}")
    return importlib.import_module(_file(package, backend), package)


def _file(package: str, backend: str) -> str:
    if backend == "torch":
        return ".reference"
    if backend in PREBUILT and not package.endswith(".near_field"):
        return ".triton"  # all else is Triton's; the prebuilt kernels are the near field
    return f".{backend}"
