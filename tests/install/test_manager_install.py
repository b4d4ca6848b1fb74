"""The two steps that Manager takes after unpacking: each line of requirements.txt, then install.py."""

import importlib.util
import json
from pathlib import Path

import pytest
from manager import install_script, requirement
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("line", (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
def test_a_line_where_triton_is_installed(line):
    if Requirement(line).marker.evaluate() and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed here: scripts/environment.py installs none on Windows without a GPU")
    done = requirement(line)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout  # it is there, or not for this system


def test_install_twice_over_an_old_status(install, shipped):
    """It writes its status file anew and nothing else; the second time it finds and says the same."""
    pack = install(shipped, "svg2-sparse-attention")
    (pack / ".cache").mkdir()
    status = pack / ".cache" / "install_status.json"
    status.write_bytes(b'{"format": 0, "version": "0.0.9"}\xff')
    before = content(pack)
    first = install_script(pack)
    between = content(pack)
    second = install_script(pack)
    assert (first.returncode, first.stderr) == (second.returncode, second.stderr) == (0, "")
    assert first.stdout == second.stdout and first.stdout.startswith("[SVG2] version ")
    assert content(pack) == between
    assert {name for name in between if between[name] != before.get(name)} == {".cache/install_status.json"} and set(between) == set(before)
    assert first.stdout.splitlines()[0] == "[SVG2] version " + json.loads(status.read_text())["version"]
