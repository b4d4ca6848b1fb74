"""Shared by all tests: the pack loaded as ComfyUI loads it, the real host, and poisoned uninitialised memory."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; subprocesses must count alike to be bit-equal
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

ROOT = Path(__file__).resolve().parents[1]
ALIAS = "svg2_pack"


def _load(name: str, path: Path, **kwargs):
    spec = importlib.util.spec_from_file_location(name, path, **kwargs)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# ComfyUI loads a pack by file location under a name nobody controls. So do the tests, all under this one.
_load(ALIAS, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])


@pytest.fixture(scope="session")
def host():
    """The real ComfyUI, importable as `comfy` from here on; its folder."""
    script = _load("svg2_host_script", ROOT / "scripts" / "host.py")
    path = script.find()
    script.activate(path, cpu=not torch.cuda.is_available())
    return path


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN (or the largest integer), and an operation without a deterministic form raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
