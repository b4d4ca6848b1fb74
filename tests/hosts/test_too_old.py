"""A host older than any that the tests run in: one sentence at start, and no nodes."""

import asyncio
import importlib.util
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(monkeypatch, version: str | None):
    """The pack, as a ComfyUI of that version loads it; None: no ComfyUI."""
    if version is None:
        monkeypatch.delitem(sys.modules, "comfyui_version", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "comfyui_version", types.SimpleNamespace(__version__=version))
    spec = importlib.util.spec_from_file_location("svg2_old", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "svg2_old", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["0.3.40", "0.15.1", "0.16.2"])
def test_one_sentence_and_no_nodes(host, monkeypatch, caplog, version):
    pack = load(monkeypatch, version)
    extension = asyncio.run(pack.comfy_entrypoint())
    asyncio.run(extension.on_load())
    assert asyncio.run(extension.get_node_list()) == []
    [told] = [record.message for record in caplog.records if record.name == "svg2"]
    assert "needs ComfyUI 0.16.3 or newer" in told and version in told and "\n" not in told


@pytest.mark.parametrize("version", ["0.16.3", "0.17.0", "0.30.0", "0.46.1", "1.0", "1.0.0rc1", None, "unknown"])
def test_any_other_is_served(host, monkeypatch, caplog, version):
    pack = load(monkeypatch, version)
    assert pack.TOO_OLD == "" and caplog.records == []


def test_the_registry_is_told_the_same(monkeypatch):
    oldest = load(monkeypatch, None).OLDEST_COMFYUI
    assert f'requires-comfyui = ">={oldest}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for document in ("README.md", "web/docs/installation.md"):
        assert f"ComfyUI {oldest} or newer" in (ROOT / document).read_text(encoding="utf-8")
