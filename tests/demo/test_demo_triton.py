"""The demo with the Triton kernels: natively on a GPU, in Triton's interpreter without one, where a tiny video takes a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.xdist_group("demo")  # all write to output/demo


def write_tiny_workflow(path: Path) -> None:
    """The demo's workflow at 96 tokens and 2 steps: less tokens have less than 3 key clusters, and all would be selected."""
    workflow = json.loads((ROOT / "workflows" / "demo_wan_small.json").read_text())
    widgets = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    widgets["SVG2DemoConditioning"][1:] = [96, 64, 13]  # width, height, frames
    widgets["KSampler"][2] = 2
    # What both backends have: the paper's clusters and rule, with centroids.
    knobs = {1: "paper", 4: 0.5, 6: 0.03, 7: 4, 8: 1, 12: "centroid"}  # preset, top_p, min_k_ratio, k-means, compensation
    for place, value in knobs.items():
        widgets["SVG2SparseAttention"][place] = value
    path.write_text(json.dumps(workflow))


def demo(workflow: Path, backend: str) -> dict:
    """report.json of a run with `backend` in place of auto."""
    command = [sys.executable, "scripts/demo.py", "--json", "--workflow", str(workflow)]
    environment = {**os.environ, "SVG2_BACKEND": backend}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((ROOT / "output" / "demo" / "report.json").read_text())


def test_it_keeps_the_dense_video(tmp_path):
    """That it is the torch backend's: tests/nodes/test_triton_backend.py."""
    write_tiny_workflow(tmp_path / "tiny.json")
    report = demo(tmp_path / "tiny.json", "triton")
    assert report["backend"] == "triton" and report["tokens"] == 96
    # Of 6 blocks the first is dense, of 2 steps too.
    assert report["runs"][0]["sparse_calls"] == 5 and set(report["fallbacks"]) == {"warmup", "dense_block"}
    assert 25 <= report["psnr_db"] < 100 and report["density"] < 0.9, "else nothing was sparse"
