"""What the prebuilt machine code is made of: the instructions the kernels were written for, and nothing spilled."""

import json
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="its disassembler is used, and it has no build for this system")

PREBUILT = Path(__file__).resolve().parents[2] / "cuda" / "prebuilt"
FILES = [entry for entry in json.loads((PREBUILT / "manifest.json").read_text())["files"] if entry["kind"] == "sass"]
# What one program may have on a GPU of each architecture, beside the 1 KiB that the system keeps.
MOST_SHARED = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}  # KiB


def test_every_architecture_is_there():
    assert sorted(entry["arch"] for entry in FILES) == sorted(MOST_SHARED)


@pytest.mark.parametrize("entry", FILES, ids=lambda entry: "sm_" + entry["arch"])
def test_instructions(entry):
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([disassembler, "-sass", PREBUILT / entry["file"]], capture_output=True, text=True, check=True)
    bodies = {part.split()[0]: part for part in done.stdout.split("Function : ")[1:]}
    attention = {name: body for name, body in bodies.items() if name.startswith("svg2_attention")}
    assert len(attention) == 8 and "svg2_plan" in bodies
    for name, body in attention.items():
        for instruction in ("HMMA.16816.F32", "LDGSTS", "LDSM", "MUFU.EX2"):
            assert instruction in body, f"{name}: no {instruction}"
        assert "LDSM.16.MT88.4" in body, f"{name}: values are not read transposed"
    for name, body in bodies.items():
        assert "LDL" not in body and "STL" not in body, f"{name}: local memory"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rows", [64, 128])
def test_shared_memory_fits_every_gpu(head_dim, rows):
    from svg2_pack.svg2_core.ops.dynamic_attention import cuda

    assert cuda.shared_bytes(head_dim, rows) <= min(MOST_SHARED.values()) * 1024


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rows", [64, 128])
def test_the_launcher_asks_for_the_shared_memory_that_the_kernel_lays_out(head_dim, rows):
    import ctypes

    import emulated_cuda
    from svg2_pack.svg2_core.ops.dynamic_attention import cuda

    library = emulated_cuda.library()
    assert cuda.shared_bytes(head_dim, rows) == library.shared_bytes(head_dim, rows)
    assert ctypes.sizeof(cuda.Params) == library.parameter_bytes()
