"""The Doctor tells the truth about this machine."""

import re

import pytest
import torch
from svg2_pack.svg2_core.ops import registry


@pytest.fixture
def report(host):
    from svg2_pack.nodes.doctor import SVG2Doctor

    def run() -> str:
        output = SVG2Doctor.execute()
        assert output.ui.as_dict()["text"] == (output.result[0],)
        return output.result[0]

    yield run
    for name in registry.NAMES:
        registry.reinstate(name)


def test_it_names_every_backend(report, monkeypatch):
    monkeypatch.delenv("SVG2_BACKEND", raising=False)
    text = report()
    assert f"torch: {torch.__version__}" in text
    assert "backend torch: ready" in text
    if not torch.cuda.is_available():
        assert "backend cuda: " in text and "needs an NVIDIA GPU" in text
        assert "auto takes: sdpa" in text and "backend sdpa: ready (self-test" in text
        assert re.search(r"speed at 10,240 tokens, 2 heads: ComfyUI's attention \d+\.\d+ ms, SVG2 \(sdpa\) \d+\.\d+ ms, \d+\.\d+x, density 5%", text)


def test_a_backend_that_failed_is_tried_again(report):
    registry.retire("torch", RuntimeError("it was a bad day"))
    assert "had failed (RuntimeError: it was a bad day); trying again" in report()
    assert registry.retired("torch") is None


def test_a_broken_machine_is_reported_not_raised(report, monkeypatch):
    from svg2_pack.nodes import doctor

    def broken(*args, **kwargs):
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(doctor, "made_up", broken)
    monkeypatch.setattr(registry, "choose", lambda *args: "triton")
    lines = doctor.speed_lines(torch.device("cuda", 0))
    assert lines == ["speed: the test failed (RuntimeError: no such GPU)"]
