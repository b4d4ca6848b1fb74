"""What workflows, prompts and the front end know the pack by stays as it is: names.json may grow, at the end of a list, and no more.

A saved workflow holds a node's values in the order of its inputs, a prompt by their names, a browser asks routes and listens to
events. A name that is new is added to names.json by hand, in the change that brings it.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))


def schemas() -> dict:
    import svg2_pack.nodes as pack

    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in pack.NODES)}


def test_nodes_with_their_inputs_and_outputs(host):
    found = {node: {"inputs": [i.id for i in schema.inputs], "outputs": [o.id for o in schema.outputs]} for node, schema in schemas().items()}
    assert found == NAMES["nodes"]


def test_options(host):
    """Of choices: those that a saved value may name."""
    found = {f"{node}.{i.id}": list(i.options) for node, schema in schemas().items() for i in schema.inputs if getattr(i, "options", None)}
    assert found == NAMES["options"]


def test_routes_and_events(host):
    from svg2_pack.nodes.telling import live

    assert NAMES["server"] == {"route": live.ROUTE, "event": live.EVENT}


def test_workflows():
    assert sorted(path.stem for path in (ROOT / "workflows").glob("*.json")) == NAMES["workflows"]
    assert sorted(path.stem for path in (ROOT / "workflows/api").glob("*.json")) == [name for name in NAMES["workflows"] if not name.startswith("demo_")]
