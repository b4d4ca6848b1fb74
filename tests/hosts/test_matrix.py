"""Older hosts: the families, and the tests of the nodes that matter most there, in each of them, quickly.

`python scripts/test.py -m hosts`. A host is fetched on first use, 12 MB. The pinned one runs all tests, outside of this file.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from host import fetched  # noqa: E402

pytestmark = pytest.mark.hosts

OLDER = ["0.16.3", "0.20.1", "0.24.0"]
FAMILIES = {version: "t2v or vace or animate or cosmos or (ltxv and guide)" for version in OLDER} | {"0.20.1": "wan2.1 or hunyuan_video"}
NODES = ["test_dense_with_a_reason.py", "test_no_silence.py", "test_options_of_other_nodes.py", "test_other_patches.py"]


def in_host(version: str, *arguments: str) -> tuple[int, int]:
    """Run tests in another host: -> how many passed, how many were skipped. None may fail."""
    folder = fetched(version)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "--tb=short", "-rs", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env={**environment, "COMFYUI_PATH": str(folder), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    skipped = re.findall(r"^SKIPPED \[(\d+)\] (.*)", done.stdout, re.MULTILINE)
    assert all(f"ComfyUI {version} has no" in reason for _, reason in skipped), skipped
    return int(re.search(r"(\d+) passed", done.stdout)[1]), sum(int(count) for count, _ in skipped)


@pytest.mark.parametrize("version", OLDER)
def test_families(version):
    """Everything selected equals dense."""
    passed, skipped = in_host(version, "tests/models/test_families.py", "-k", f"everything_selected and density and ({FAMILIES[version]})")
    assert passed >= 6 and passed > 2 * skipped


@pytest.mark.parametrize("version", OLDER[:1])  # between that and the pinned one, which runs all tests, are the others
def test_nodes(version):
    passed, _ = in_host(version, *(f"tests/nodes/{name}" for name in NODES))
    assert passed >= 40
