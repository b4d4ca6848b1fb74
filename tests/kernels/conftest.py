"""What every test of an operation runs over: each backend, each dtype. A new backend joins by its name in BACKENDS."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

# The helpers beside the tests (brute_force, cases, accuracy) are imported by their names.
sys.path.insert(0, str(Path(__file__).parent))

BACKENDS = ["torch", "triton"] if importlib.util.find_spec("triton") else ["torch"]  # Triton has no macOS build
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pytest_collection_modifyitems(items):
    """Leave out what cannot be run: the interpreter's bf16 products are garbage (triton 3.6 to 3.9), true bf16 is for a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        items[:] = [item for item in items if not _interpreted_bf16(getattr(item, "callspec", None))]


def _interpreted_bf16(callspec) -> bool:
    return callspec is not None and callspec.params.get("backend") == "triton" and torch.bfloat16 in callspec.params.values()


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """These sizes are too small to share: on a busy machine, threads waiting for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
