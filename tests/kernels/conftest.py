"""What every test of an operation runs over: each backend, each dtype. A new backend joins by its name in BACKENDS."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

# The helpers beside the tests (brute_force, cases, accuracy) are imported by their names.
sys.path.insert(0, str(Path(__file__).parent))

import emulated_cuda

# Triton has no macOS build.
BACKENDS = ["torch", "sdpa", "triton"] if importlib.util.find_spec("triton") else ["torch", "sdpa"]
# The prebuilt CUDA kernels are the near field alone. They run natively on a GPU, and in an emulator without one.
PREBUILT = list(emulated_cuda.PREBUILT) if importlib.util.find_spec("triton") else []
# The stages of the far field, which not all backends have, are tested by what they do without naming one: here it is named.
WITH_FAR_FIELD = ["torch", "sdpa", "triton"] if importlib.util.find_spec("triton") else ["torch", "sdpa"]
OF_THE_FAR_FIELD = {"test_moments", "test_select_by_error", "test_near_field", "test_far_field", "test_first_order_call"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# Whole calls that would take minutes in the interpreter and whose parts are tested there one by one; a GPU runs them all.
_SLOW_WHEN_INTERPRETED = {
    "test_heads_at_a_time_changes_nothing",
    "test_compensation_halves_the_error",
    "test_error_falls_and_density_rises_with_top_p",
    "test_rows_are_their_own_business",
    "test_rows_are_their_own_business_with_threads",
    "test_centroids_carry_over_through_the_cache",
    "test_centroids_of_another_shape_are_a_cold_start",
    "test_result_follows_the_queries_memory",
    "test_scale",
}
# Of the whole calls with the far field, those that are small.
_WHOLE_CALLS_INTERPRETED = {"test_dropped_means_dropped", "test_fewer_tokens_than_directions", "test_all_is_no_number", "test_heads_in_chunks_and_rows_alone_are_the_same_bits"}
_PARTS_INTERPRETED = {"test_all_selected_is_dense", "test_parts_are_as_near_to_dense_as_the_whole"}


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.rpartition(".")[2] in OF_THE_FAR_FIELD:
        # The near field once more as it runs on devices whose fused attention gives no logsumexp.
        further = ["sdpa_public", *PREBUILT] if metafunc.module.__name__.endswith("near_field") else []
        metafunc.fixturenames.append("default_backend")
        metafunc.parametrize("default_backend", [*WITH_FAR_FIELD, *further], indirect=True)


@pytest.fixture(autouse=True)
def default_backend_is_set(request) -> None:
    """pytest drops a fixture from a test that is parametrised by it and does not ask for it."""
    if hasattr(request.node, "callspec") and "default_backend" in request.node.callspec.params:
        request.getfixturevalue("default_backend")


@pytest.fixture
def default_backend(request, monkeypatch) -> str:
    """The backend that the stages of the far field, and a whole call, take where none is named."""
    from svg2_pack.svg2_core.attention import svg2_attention
    from svg2_pack.svg2_core.ops.far_field import far_field
    from svg2_pack.svg2_core.ops.moments import moments
    from svg2_pack.svg2_core.ops.near_field import near_field
    from svg2_pack.svg2_core.ops.select import select_by_error

    backend = request.param.removesuffix("_public")
    if backend != request.param:
        monkeypatch.setattr("svg2_pack.svg2_core.ops.near_field.fused._CPU", None)
    if backend in PREBUILT:
        _prepare_prebuilt(backend, request, monkeypatch)
    for function in (svg2_attention, far_field, moments, near_field, select_by_error):
        monkeypatch.setitem(function.__kwdefaults__, "backend", backend)
    return backend


def pytest_collection_modifyitems(items):
    """Leave out what a backend does not do; and, without a GPU, what Triton's interpreter cannot do, or not in time."""
    items[:] = [item for item in items if not _not_for_prebuilt(item) and not _not_for_sdpa(item)]
    if os.environ.get("TRITON_INTERPRET") == "1":
        items[:] = [item for item in items if not _not_for_the_interpreter(item)]


def _not_for_prebuilt(item) -> bool:
    """They are for 16 bits and two head dimensions."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("default_backend") in PREBUILT and (
        parameters.get("dtype") == torch.float32 or parameters.get("d", 64) not in (64, 128)
    )


def _not_for_sdpa(item) -> bool:
    """For norms and rotary embedding torch's own are at hand."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("backend") == "sdpa" and item.path.stem in ("test_large_offsets", "test_norm_rope")


def _not_for_the_interpreter(item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("default_backend") == "triton" and item.path.name == "test_first_order_call.py":
        return item.originalname not in _WHOLE_CALLS_INTERPRETED
    if parameters.get("backend") != "triton":
        return False
    if item.path.name == "test_parts.py":
        return item.originalname not in _PARTS_INTERPRETED
    whole_call = item.path.name == "test_svg2_attention.py"
    return (
        torch.bfloat16 in parameters.values()  # its bf16 products are garbage (triton 3.6 to 3.9)
        or item.originalname in _SLOW_WHEN_INTERPRETED
        or (whole_call and torch.float16 in parameters.values())
    )


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def _prepare_prebuilt(backend, request, monkeypatch) -> None:
    """On a CPU its kernels are emulated, and watched."""
    if torch.cuda.is_available():
        if backend == "cuda_fa3" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        return
    module = emulated_cuda.Module(emulated_cuda.PREBUILT[backend])
    launcher = importlib.import_module("svg2_pack.svg2_core.ops.near_field.cuda").LAUNCHERS[backend]
    monkeypatch.setattr(launcher, "load", lambda device: module)
    request.addfinalizer(lambda: _no_bank_conflicts(module))


def _no_bank_conflicts(module) -> None:
    assert module.conflicts.value == 0, "rows of shared memory that are read together lie in the same banks"


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


@pytest.fixture
def memory(device, tmp_path):
    """fp16 elements of which only those in use take memory on a CPU. It begins 2^31 before the first tensor: there a
    wrapped offset finds zeros."""
    from large import REACH, ROOM

    size = 2**31 + REACH + 8 * ROOM
    if device.type == "cpu":
        yield torch.from_file(str(tmp_path / "memory"), shared=True, size=size, dtype=torch.float16)
        (tmp_path / "memory").unlink()
    else:
        if torch.cuda.mem_get_info(device)[0] < 2 * size + 2**30:
            pytest.skip("needs 11 GB of free GPU memory")
        yield torch.zeros(size, dtype=torch.float16, device=device)
