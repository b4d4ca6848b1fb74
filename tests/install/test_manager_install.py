"""What Manager runs after unpacking, beside pip for requirements.txt: install.py."""

import json
from pathlib import Path

from manager import install_script


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
