"""A simulated NVIDIA driver and compiler for the tests here, and prebuilt files that may be spoilt."""

import json
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # the fakes, by their names

NAME = "near_field_fa2"


@pytest.fixture
def driver():
    """The pack's driver module."""
    from svg2_pack.cuda import driver

    return driver


@pytest.fixture
def prebuilt(tmp_path, monkeypatch):
    """A copy of cuda/prebuilt that the pack uses instead of its own."""
    from svg2_pack.cuda import images

    folder = tmp_path / "prebuilt"
    shutil.copytree(ROOT / "cuda" / "prebuilt", folder)
    monkeypatch.setattr(images, "PREBUILT", folder)
    return folder


@pytest.fixture
def simulate(monkeypatch, tmp_path):
    """simulate(capability, ...) -> FakeDriver that the pack's driver module now talks to; no compiler, no cache yet."""
    from fake_driver import FakeDriver
    from svg2_pack.cuda import api, driver, local_build

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(local_build, "libraries", lambda *arguments: [])

    def start(*capabilities, **options):
        fake = FakeDriver(*capabilities, **options)
        monkeypatch.setattr(api.Driver, "load", classmethod(lambda cls: cls(fake)))
        driver.forget()
        return fake

    yield start
    driver.forget()


@pytest.fixture(scope="session")
def manifest():
    """The entries of the real manifest by file name."""
    entries = json.loads((ROOT / "cuda" / "prebuilt" / "manifest.json").read_text())["files"]
    return {entry["file"]: entry for entry in entries}
