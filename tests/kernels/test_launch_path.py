"""A sparse call on the GPU never waits for the device, and its work memory is bounded, at the real size."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

import launches


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In place of the suite's: fake tensors have no memory to poison."""


def test_no_host_synchronisation_and_bounded_memory(monkeypatch):
    with launches.record(monkeypatch) as recording:
        result, peak = launches.sparse_call(recording)
        assert result.out.shape == (1, 40, 75_600, 128)
    assert len(recording.launches) > 0
    assert peak <= 96 * 2**20, f"{peak / 2**20:.0f} MiB of index and work memory"
    assert peak >= 8 * 2**20, "less than the cluster orders of one chunk of heads alone: the measure is broken"


def test_the_recorder_catches_a_synchronisation(monkeypatch):
    """Guards the test above."""
    with launches.record(monkeypatch), pytest.raises(Exception, match=r"item|data-dependent|_local_scalar_dense"):
        torch.empty(3).sum().item()


@pytest.mark.parametrize("text, bias", [(256, False), (256, True)])
def test_text_tokens_need_no_synchronisation_either(monkeypatch, text, bias):
    with launches.record(monkeypatch) as recording:
        launches.sparse_call(recording, h=24, n=118_800, text=text, bias=bias)
    assert any(launch.args.get("HAS_TEXT") for launch in recording.launches)


def test_grids_are_within_cudas_limits(monkeypatch):
    with launches.record(monkeypatch) as recording:
        launches.sparse_call(recording, b=4, n=200_000)
    for launch in recording.launches:
        x, y, z = (*launch.grid, 1, 1)[:3]
        assert x < 2**31 and y < 2**16 and z < 2**16, f"{launch.kernel} {launch.grid}"
