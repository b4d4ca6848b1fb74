"""The English node texts are the schema's own; other languages follow their keys (tests/unit/test_locales.py)."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_english_texts_are_the_schemas(host):
    """Of all nodes, also of those that are only offered where another pack is installed."""
    from svg2_pack.nodes import NODES

    schemas = [node.GET_SCHEMA() for node in NODES]
    english = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    assert english == {schema.node_id: texts(schema) for schema in schemas}, "run scripts/build_locales.py"


def texts(schema) -> dict:
    def slot(thing, name):
        return {"name": name} | ({"tooltip": thing.tooltip} if thing.tooltip else {})

    found = {"display_name": schema.display_name, "description": schema.description}
    if schema.inputs:
        found["inputs"] = {i.id: slot(i, i.display_name or i.id) for i in schema.inputs}
    if schema.outputs:
        found["outputs"] = {str(n): slot(o, o.display_name or o.id) for n, o in enumerate(schema.outputs)}
    return found
