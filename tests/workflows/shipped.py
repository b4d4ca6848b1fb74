"""The workflow files as they are shipped, and the host's own description of their nodes put in order."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows"
BUILT = sorted(path.stem for path in FOLDER.glob("*.json") if not path.stem.startswith("demo_wan"))  # the demo's are written by hand
NOTE = "MarkdownNote"  # the editor's own, which the server knows nothing of
PRIMITIVES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}  # what the editor shows as widgets


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def editor(name: str) -> dict:
    return read(FOLDER / f"{name}.json")


def api(name: str) -> dict:
    return read(FOLDER / "api" / f"{name}.json")


def declared_inputs(info: dict) -> dict:
    """Name -> (type, options, list of choices or None) of a node's inputs, in the order of its widgets."""
    found = {}
    for name, (kind, *rest) in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
        options = rest[0] if rest else {}
        choices = kind if isinstance(kind, list) else options.get("options")
        if choices and isinstance(choices[0], dict):  # a combo whose choices bring inputs of their own
            choices = [choice["key"] for choice in choices]
        kind = "COMBO" if isinstance(kind, list) else kind
        # Of several types, "FLOAT,INT", the first one has the widget.
        found[name] = (kind.split(",")[0] if kind.split(",")[0] in PRIMITIVES else kind, options, choices)
    return found
