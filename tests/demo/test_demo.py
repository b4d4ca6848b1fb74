"""The README's first command, end to end: a real server, the workflow file, the shipped checkpoint, the auto preset."""

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
    return run("scripts/demo.py", "--json")


def test_the_main_job(demo):
    assert demo.returncode == 0, demo.stderr[-3000:]
    table = json.loads(demo.stdout.splitlines()[-1])
    assert set(table) == {"tokens", "density", "attention_error", "sparse_share", "psnr_db", "ssim", "rel_l2", "dense_s_per_step",
                          "svg2_s_per_step", "backend", "fallbacks", "gpu"}  # fmt: skip
    assert table["tokens"] == 13 * 12 * 20
    assert 0 < table["density"] <= 0.06
    assert table["sparse_share"] == 1 and table["fallbacks"] == {}, "no dense step, no dense block"
    if table["backend"] == "torch":
        assert 42 <= table["psnr_db"] < 100, "100 stands for equal videos: then nothing was sparse"
        assert 0 < table["attention_error"] < 0.12
    if table["gpu"] is None:
        assert "the speed here means nothing" in demo.stdout


def test_its_files_can_be_opened(demo):
    folder = ROOT / "output" / "demo"
    sizes = {}
    for name in ("dense", "svg2", "side_by_side"):
        with av.open(str(folder / f"{name}.mp4")) as video:
            frames = list(video.decode(video=0))
        assert len(frames) == 13
        sizes[name] = (frames[0].width, frames[0].height)
    assert sizes["dense"] == sizes["svg2"] == (320, 192) and sizes["side_by_side"][0] == 640
    report = json.loads((folder / "report.json").read_text())
    grid = report["runs"][0]["density_by_block_and_step"]
    assert len(grid) == 6 and {len(row) for row in grid} == {20}
    assert (folder / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("scripts/host.py", "--print-path", "--comfyui", "no/such/folder"), "not a ComfyUI folder"),
        (("scripts/demo.py", "--comfyui", "no/such/folder"), "not a ComfyUI folder"),
        (("scripts/demo.py", "--workflow", "no/such/file.json"), "cannot be read"),
        (("scripts/demo.py", "--workflow", "README.md"), "not JSON"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(arguments, says):
    result = run(*arguments, timeout=60)
    assert result.returncode == 2
    assert says in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
