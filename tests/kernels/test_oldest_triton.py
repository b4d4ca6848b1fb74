"""The kernels with the oldest Triton that they are for: they compile, and one case of every stage is right in its interpreter.

The suite's own is the newest. TRITON.md has all between, all architectures and all variants: `python scripts/triton_matrix.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

import compile_ahead
from test_compile import SHARED_KIB, kernels

HERE = Path(__file__).parent
sys.path.insert(0, str(compile_ahead.ROOT / "scripts"))
# A case of each stage: clusters in spaces and in the tokens' own, moments, both rules of selection, near and far field, exact rows.
STAGES = (
    "test_kmeans.py::test_warm_start_goes_on[triton]",
    "test_moments.py::test_clusters_without_extent[triton]",
    "test_select_by_error.py::test_density_is_reached_and_never_passed[triton-0.1]",
    "test_far_field.py::test_queries_that_are_a_part[triton-text_around-1]",
    "test_near_field.py::test_lengths[triton-129]",
    "test_parts.py::test_all_selected_is_dense[triton-with_text]",
    "test_first_order_call.py::test_fewer_tokens_than_directions[triton-20]",
)


@pytest.fixture(scope="module")
def oldest(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that finds it before the suite's own; kept between runs."""
    import triton_matrix
    from filelock import FileLock

    version = triton_matrix.oldest()
    (compile_ahead.ROOT / ".cache").mkdir(exist_ok=True)
    with FileLock(str(compile_ahead.ROOT / ".cache" / f"triton-{version}.lock")):  # several processes may want it
        folder = triton_matrix.folder(version)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS")}
    environment |= {"PYTHONPATH": folder, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    found = subprocess.run([sys.executable, "-c", "import triton; print(triton.__version__)"], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == version, found.stderr
    return environment


def test_it_compiles_them(oldest):
    run = subprocess.run([sys.executable, compile_ahead.__file__, "86", "--once"], env=oldest, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == kernels()
    assert {row["rows"] for row in rows if row["kernel"] == "near_field_kernel"} == {64, 128}
    assert all(row["shared"] <= SHARED_KIB[86] * 1024 for row in rows)


def test_stages_in_its_interpreter(oldest):
    tests = [str(HERE / name) for name in STAGES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
    run = subprocess.run(command, env=oldest, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:]
    passed = int(run.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed == len(STAGES) and "skipped" not in run.stdout
