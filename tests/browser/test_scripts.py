"""scripts/build_thumbnails.py as its users run it; it refuses a graph that does not look right."""

import os
import subprocess
import sys
from pathlib import Path

import editor
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_thumbnails.py"


def test_a_thumbnail(tmp_path):
    chromium = editor.chromium()
    if chromium is None:
        pytest.skip("no Chromium: see tests/browser/conftest.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"SVG2_CHROMIUM": chromium}
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path), "wan2.2_t2v_14B"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [picture] = tmp_path.iterdir()
    assert picture.name == "wan2.2_t2v_14B.jpg" and picture.stat().st_size < 150_000
    assert Image.open(picture).width == 1280
