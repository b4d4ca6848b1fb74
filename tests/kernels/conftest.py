"""What every test of an operation runs over: each backend, each dtype. A new backend joins by its name in BACKENDS."""

import sys
from pathlib import Path

import pytest
import torch

# The helpers beside the tests (brute_force, cases, accuracy) are imported by their names.
sys.path.insert(0, str(Path(__file__).parent))

BACKENDS = ["torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
