"""A sparse call on the GPU at the real size: it never waits for the device, launches little, compiles few kernels, and its work
memory is what workspace.py says."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

import launch_cost
import launches
from svg2_pack.svg2_core.ops.workspace import bytes_per_head, heads_that_fit

WAN_720P = {"h": 40, "n": 75_600, "d": 128}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In place of the suite's: fake tensors have no memory to poison."""


@pytest.mark.parametrize("shape", [WAN_720P, {"h": 12, "n": 32_760, "d": 128}, {"h": 24, "n": 118_800, "d": 128}, {"h": 8, "n": 12_480, "d": 64}])
def test_no_host_synchronisation_and_bounded_memory(monkeypatch, shape):
    with launches.record(monkeypatch) as recording:
        result, peak = launches.sparse_call(recording, **shape)
        assert result.out.shape == (1, *shape.values())
    assert len(recording.launches) > 0
    bound = shape["h"] * bytes_per_head(shape["n"], 300, 1000, shape["d"], 32)
    assert 0.6 * bound <= peak <= bound, f"{peak / 2**20:.0f} MiB of index and work memory, {bound / 2**20:.0f} foreseen"


def test_wan_720p_in_one_go(monkeypatch):
    """At most 60 launches, Triton's and torch's, within 512 MiB."""
    with launches.record(monkeypatch) as recording:
        _, peak = launches.sparse_call(recording, **WAN_720P)
    assert len(recording.launches) + recording.torch_launches <= 60
    assert recording.torch_launches >= 3, "torch's own launches are not counted any more"
    assert peak <= 512 * 2**20


def test_videos_of_all_sizes_share_their_kernels():
    """By Triton's own key: few variants for one call, and next to none more for other sizes, heads and counts of clusters."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, launch_cost.__file__], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == len(launch_cost.VIDEOS) + 1
    assert all(20 < row["launches"] <= 60 for row in rows)
    assert 20 < rows[0]["variants"] <= 45 and rows[-1]["variants"] <= 50


def test_chunks_of_heads_when_memory_is_short(monkeypatch):
    """As many heads at a time as fit, and no more launches than as many calls."""
    of = (75_600, 300, 1000, 128, 32)
    assert heads_that_fit(*of, rows=1, limit=2**30) >= 40
    assert heads_that_fit(*of, rows=2, limit=600 * 2**20) == heads_that_fit(*of, rows=1, limit=300 * 2**20) >= 20
    assert heads_that_fit(*of, rows=1, limit=88 * 2**20) >= 5 and heads_that_fit(*of, rows=1, limit=1) == 1
    with launches.record(monkeypatch) as recording:
        launches.sparse_call(recording, h=12, heads_at_a_time=6)
    assert len(recording.launches) + recording.torch_launches <= 2 * 60 + 10


def test_the_recorder_catches_a_synchronisation(monkeypatch):
    """Guards the tests above."""
    with launches.record(monkeypatch), pytest.raises(Exception, match=r"item|data-dependent|_local_scalar_dense"):
        torch.empty(3).sum().item()


@pytest.mark.parametrize("text, bias", [(256, False), (256, True)])
def test_text_tokens_need_no_synchronisation_either(monkeypatch, text, bias):
    with launches.record(monkeypatch) as recording:
        launches.sparse_call(recording, h=24, n=118_800, text=text, bias=bias)
    assert any(launch.args.get("HAS_TEXT") for launch in recording.launches)


@pytest.mark.parametrize("settings", [{"density": None, "top_p": 0.5, "compensation": "off", "metric_directions": 0}, {"compensation": "centroid"}, {"density": 1.0}])
def test_other_settings_need_no_synchronisation_either(monkeypatch, settings):
    with launches.record(monkeypatch) as recording:
        launches.sparse_call(recording, **settings)
    assert len(recording.launches) > 20


def test_grids_are_within_cudas_limits(monkeypatch):
    with launches.record(monkeypatch) as recording:
        launches.sparse_call(recording, b=4, n=200_000)
    for launch in recording.launches:
        x, y, z = (*launch.grid, 1, 1)[:3]
        assert x < 2**31 and y < 2**16 and z < 2**16, f"{launch.kernel} {launch.grid}"
