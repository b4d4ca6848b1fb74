"""The kernels of norms and rotary embedding compile for every architecture, do not spill, and address in 64 bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

pytestmark = pytest.mark.xdist_group("norm_rope_compile")  # compiled once, for all of these tests

ARCHITECTURES = [80, 86, 89, 90, 120]
# Registers of a multiprocessor, in all of them; a program that takes more than a half of them leaves too few in flight.
REGISTERS = 65536


@pytest.fixture(scope="module")
def rows():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_norm_rope.py")), *map(str, ARCHITECTURES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_all_compile_without_spills(rows):
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    for arch in ARCHITECTURES:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == {"norm_kernel", "rotary_kernel"}
    for row in rows:
        assert row["stack"] == 0 and row["local"] == 0, f"spills: {row}"


def test_enough_programs_fit_on_a_multiprocessor(rows):
    """Memory-bound work hides its latency by what else is in flight."""
    for row in rows:
        threads = 32 * row["options"]["num_warps"]
        assert 2 * threads * row["registers"] <= REGISTERS, row
        assert 2 * row["shared"] <= 99 * 1024, row


def test_addresses_are_64_bit(rows):
    """In 32 bits nothing is multiplied but an index, by a tile's size."""
    for row in rows:
        assert set(row["factors_32"]) <= set(row["tiles"]), f"addresses past 2^31 wrap: {row}"
    assert any(row["factors_32"] for row in rows), "32-bit products are not recognised any more"


def test_grids_are_within_cudas_limits(rows):
    for row in rows:
        x, y, z = row["grid"]
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, row


def test_loads_go_in_wide_transactions(rows):
    """16 bytes a thread, of rows and of both halves of a pair alike."""
    for row in rows:
        if row["call"] != "odd sizes":
            assert row["wide_loads"] > 0 and row["wide_stores"] > 0, row
