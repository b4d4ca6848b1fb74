"""Every Triton kernel and configuration compiles for every architecture, fits its shared memory, does not spill, and overlaps its
copies with its products."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

import compile_ahead

# Shared memory a block may ask for, in KiB (CUDA C programming guide, technical specifications per compute capability).
SHARED_KIB = {86: 99, 90: 227}
ON_TENSOR_CORES = {"assign", "sample_moment", "within", "key_moments", "near_field", "far_field", "fit", "exact_split"}
# Instructions of one step of the near field's loop, in all of its warps' common code: 64 keys on sm_90, 32 elsewhere. More means
# that something is looked up, masked or converted that need not be.
MOST_INSTRUCTIONS = {86: 800, 90: 850}
# One program a head, whose time are barriers: a few bytes there cost nothing, and ptxas finds no way without on some architectures.
MAY_SPILL = {"directions": 64}


def kernels() -> set[str]:
    """The names of all kernels in the folders of the operations of a call."""
    found = set()
    for path in (compile_ahead.ROOT / "svg2_core/ops").glob("*/*.py"):
        if path.parent.name != "norm_rope":  # compiled in test_norm_rope_compile.py
            found |= {line.split("(")[0][4:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("def ") and "_kernel(" in line}
    return found


# scripts/triton_matrix.py does all architectures, with all versions of Triton (TRITON.md): here those that differ most.
@pytest.mark.parametrize("arch", [86, 90])
def test_kernels_compile_and_fit(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, compile_ahead.__file__, str(arch)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == kernels()
    for row in rows:
        name = row["kernel"].removesuffix("_kernel")
        assert row["stack"] + row["local"] <= MAY_SPILL.get(name, 0), f"spills: {row}"
        assert row["shared"] <= SHARED_KIB[arch] * 1024, row
        # In 32 bits, nothing but an index is multiplied, and by nothing but a tile's size: that stays below the number of
        # tokens. Strides and counts take addresses past 2^31. (Head dimensions of 80 and 96 cannot pass for a tile.)
        assert set(row["factors_32"]) <= set(row["tiles"]), f"addresses past 2^31 wrap: {row}"
        if name in ON_TENSOR_CORES:
            assert row["loop"]["products"] > 0, f"no tensor cores in its loop: {row}"
        if name in ("near_field", "far_field"):
            assert row["loop"]["copies"] > 0 and row["loop"]["in_flight"] >= 1, f"the loop waits for all of its copies: {row}"
        if name == "near_field":
            assert row["loop"]["instructions"] <= MOST_INSTRUCTIONS[arch], row
    assert any(row["factors_32"] for row in rows), "32-bit products are not recognised any more"
    assert {row["rows"] for row in rows if row["kernel"] == "near_field_kernel"} == {64, 128}, "both tile heights"


def test_the_look_at_machine_code_sees_a_loop_that_waits():
    """Guards the test above: copies that are all waited for, and a loop without products."""
    sass = """
.L_x_1:
        /*0010*/ LDGSTS.E.BYPASS.128 [R1], desc[R2] ;
        /*0020*/ LDGDEPBAR ;
        /*0030*/ DEPBAR.LE SB0, {wait} ;
        /*0040*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/ @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/ IADD3 R1, R1, 1, RZ ;
        /*0070*/ @P0 BRA `(.L_x_2) ;
"""
    for wait, in_flight in (("0x0", 0), ("0x2", 2)):
        first, second = compile_ahead.loops_of(sass.replace("{wait}", wait))
        assert first == {"instructions": 4, "products": 1, "copies": 1, "in_flight": in_flight}
        assert second["products"] == 0
