"""The pack as its users get it: the files that the registry would pack, in a ComfyUI of their own."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(Path(__file__).resolve().parent)]

from comfy_server import Server  # noqa: E402
from host import find  # noqa: E402


def _listed(*options: str) -> set[str]:
    done = subprocess.run(["git", "-c", "safe.directory=*", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, check=True)
    return {name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="session")
def tracked() -> set[str]:
    """What a clone has: the paths of the tracked files, with forward slashes; while one works, also those about to be."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: the archive is made of tracked files")
    return _listed() | _listed("--others", "--exclude-standard")


@pytest.fixture(scope="session")
def shipped(tracked) -> set[str]:
    """What the registry's archive has: the tracked files that .comfyignore, in the language of .gitignore, does not name."""
    return tracked - _listed("--cached", "--others", "--ignored", "--exclude-from=.comfyignore")


@pytest.fixture
def base(tmp_path) -> Path:
    """A folder for ComfyUI's --base-directory, and the home of whoever runs it."""
    for name in ("ComfyUI", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir()
    return tmp_path / "ComfyUI"


@pytest.fixture
def install(base):
    """install(files, folder): copies of these files of the pack in that folder of custom_nodes; its path."""

    def copy(files: set[str], folder: str) -> Path:
        target = base / "custom_nodes" / folder
        for name in files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
        return target

    return copy


class Scratch(Server):
    """A ComfyUI with no other custom nodes than those that the test put there."""

    def _lay_out(self) -> None:
        self.output.mkdir(exist_ok=True)
        (self.base / "paths.yaml").write_text("{}", encoding="utf-8")


@pytest.fixture
def ask(base, monkeypatch):
    """ask(questions): runs the coroutine questions(server) against the real ComfyUI on `base`; (its result, the log)."""
    for name in ("TRITON_INTERPRET", "XDG_CACHE_HOME", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(base.parent / "home"))

    def run(questions):
        log = base / "server.log"

        async def whole():
            async with Scratch(find(), base, log, cpu=True) as server:
                return await questions(server)

        return asyncio.run(whole()), log.read_text(encoding="utf-8", errors="replace")

    return run
