"""The README's first command, end to end: a real server, the workflow files, the shipped checkpoints, the auto preset.

The small demo whole, and the one of the README's first screen in four steps of its sixteen.
"""

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.xdist_group("demo")  # one demo run for all of them


def run(*arguments: str, timeout: int = 900) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def demo():
    return run("scripts/demo.py", "--small", "--json")


@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    """The large demo in four steps."""
    workflow = json.loads((ROOT / "workflows/demo_wan.json").read_text(encoding="utf-8"))
    [sampler] = [node for node in workflow["nodes"] if node["type"] == "KSampler"]
    assert sampler["widgets_values"][2] == 16
    sampler["widgets_values"][2] = 4
    path = tmp_path_factory.mktemp("demo") / "four steps.json"
    path.write_text(json.dumps(workflow), encoding="utf-8")
    return run("scripts/demo.py", "--json", "--preset", "turbo", "--workflow", str(path))


def test_the_main_job(demo):
    assert demo.returncode == 0, demo.stderr[-3000:]
    table = json.loads(demo.stdout.splitlines()[-1])
    assert set(table) == {"tokens", "density", "attention_error", "sparse_share", "psnr_db", "ssim", "rel_l2", "dense_s_per_step",
                          "svg2_s_per_step", "dense_run_s", "svg2_run_s", "times_faster_per_step", "times_faster", "dense_attention",
                          "backend", "fallbacks", "device", "gpu"}  # fmt: skip
    assert table["tokens"] == 13 * 12 * 20
    assert 0 < table["density"] <= 0.06
    assert table["sparse_share"] == 1 and table["fallbacks"] == {}, "no dense step, no dense block"
    if table["gpu"] is None:
        assert table["backend"] == "sdpa" and "CPU" in table["device"]
        assert 42 <= table["psnr_db"] < 100, "100 stands for equal videos: then nothing was sparse"
        assert 0 < table["attention_error"] < 0.12
    for name in ("dense", "svg2"):
        assert 0 < 18 * table[f"{name}_s_per_step"] < table[f"{name}_run_s"], "19 steps are part of the whole sampling of 20"
    assert table["times_faster"] == pytest.approx(table["dense_run_s"] / table["svg2_run_s"])
    assert "ComfyUI's" in demo.stdout and " times " in demo.stdout


def test_the_large_one_is_faster(shortened):
    """Whatever else the machine does, both of its runs have it: this far off they cannot be."""
    assert shortened.returncode == 0, shortened.stderr[-3000:]
    table = json.loads(shortened.stdout.splitlines()[-1])
    assert table["tokens"] == 13 * 24 * 40 and table["sparse_share"] == 1
    assert 0.015 < table["density"] <= 0.021 and 35 <= table["psnr_db"] < 100
    if table["gpu"] is None:
        assert table["times_faster"] > 1.2 and "times faster" in shortened.stdout
        report = json.loads((ROOT / "output/demo/report.json").read_text())["runs"][0]
        assert report["attention_speedup"] > 1.2 and not report["notices"]


def test_its_files_can_be_opened(shortened):
    folder = ROOT / "output" / "demo"
    sizes = {}
    for name in ("dense", "svg2", "side_by_side"):
        with av.open(str(folder / f"{name}.mp4")) as video:
            frames = list(video.decode(video=0))
        assert len(frames) == 13
        sizes[name] = (frames[0].width, frames[0].height)
    assert sizes["dense"] == sizes["svg2"] == (640, 384) and sizes["side_by_side"][0] == 1280
    report = json.loads((folder / "report.json").read_text())
    grid = report["runs"][0]["density_by_block_and_step"]
    assert len(grid) == 6 and {len(row) for row in grid} == {4}
    assert (folder / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("scripts/host.py", "--print-path", "--comfyui", "no/such/folder"), "not a ComfyUI folder"),
        (("scripts/demo.py", "--comfyui", "no/such/folder"), "not a ComfyUI folder"),
        (("scripts/demo.py", "--workflow", "no/such/file.json"), "cannot be read"),
        (("scripts/demo.py", "--workflow", "README.md"), "not JSON"),
        (("scripts/demo.py", "--small", "--workflow", "README.md"), "give one of them"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(arguments, says):
    result = run(*arguments, timeout=60)
    assert result.returncode == 2
    assert says in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
