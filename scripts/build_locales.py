"""Write locales/en/nodeDefs.json from the nodes' own schemas: `python scripts/build_locales.py`. Run it after changing one.

The other languages are translated by hand; tests/unit/test_locales.py names the keys that one of them lacks.
"""

import importlib
import importlib.util
import json
import sys

import environment
import host

FILE = host.ROOT / "locales/en/nodeDefs.json"


def slot(thing) -> dict[str, str]:
    words = {"name": thing.display_name or thing.id}
    return {**words, "tooltip": thing.tooltip} if thing.tooltip else words


def texts(schema) -> dict:
    """What the editor shows of a node, in the form in which it looks for translations."""
    found = {"display_name": schema.display_name, "description": schema.description}
    if schema.inputs:
        found["inputs"] = {item.id: slot(item) for item in schema.inputs}
    if schema.outputs:
        found["outputs"] = {str(number): slot(item) for number, item in enumerate(schema.outputs)}
    return found


def main() -> int:
    host.activate(environment.ensure())
    spec = importlib.util.spec_from_file_location("svg2_pack", host.ROOT / "__init__.py", submodule_search_locations=[str(host.ROOT)])
    pack = sys.modules["svg2_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)

    # All of them: the one for Raylight is shown only where Raylight is, and translated everywhere.
    shown = [node.GET_SCHEMA() for node in importlib.import_module("svg2_pack.nodes").NODES]
    words = {schema.node_id: texts(schema) for schema in shown}
    FILE.write_text(json.dumps(words, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    host.guarded(main)
