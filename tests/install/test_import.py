"""What loading the pack costs at each start of ComfyUI, and what it leaves alone: the GPU above all."""

import json
import subprocess
import sys
from pathlib import Path

from front_end import nodes_of
from host import find

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.3  # seconds beyond torch and ComfyUI's own modules


def load(pack: Path) -> dict:
    """Of a process of its own: see import_cost.py."""
    command = [sys.executable, str(Path(__file__).with_name("import_cost.py")), str(ROOT / "scripts"), str(find()), str(pack)]
    done = subprocess.run(command, cwd=pack, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loading(install, shipped, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    pack = install(shipped, "svg2")
    found = load(pack)  # also compiles it, as a first start does
    assert set(found["nodes"]) == nodes_of(pack)
    assert found["touched"] == [] and found["libraries"] == [] and not found["initialized"]
    assert not {"triton", "matplotlib", "scipy", "skimage", "transformers"} & set(found["packages"])
    again = (load(pack)["cpu"] for _ in range(2))  # where the machine was busy with something else
    assert found["cpu"] < LIMIT or any(cpu < LIMIT for cpu in again)
