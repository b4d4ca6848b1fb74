"""What the real host says of its nodes, in this process: the same description that its server gives the editor."""

import asyncio
import sys

from host import ROOT


def load() -> None:
    """Import every node of the host, of this pack and of the demo; takes some ten seconds. After host.activate."""
    import nodes

    path = list(sys.path)
    asyncio.run(nodes.init_builtin_extra_nodes())
    for pack in (ROOT, ROOT / "scripts/demo_nodes"):
        if not asyncio.run(nodes.load_custom_node(str(pack))):
            raise RuntimeError(f"The host could not load the nodes in {pack}.")
    sys.path[:] = path


def object_info() -> dict:
    """The loaded nodes as `GET /object_info` describes them; their lists of files are those of this moment."""
    import nodes

    return {name: describe(name, node) for name, node in nodes.NODE_CLASS_MAPPINGS.items()}


def describe(name: str, node: type) -> dict:
    """A node's inputs and outputs, with plain strings for types, whichever of the host's two APIs it is written in."""
    import nodes

    if hasattr(node, "GET_NODE_INFO_V1"):
        info = node.GET_NODE_INFO_V1()
    else:
        info = {
            "input": node.INPUT_TYPES(),
            "output": node.RETURN_TYPES,
            "output_name": getattr(node, "RETURN_NAMES", node.RETURN_TYPES),
            "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS.get(name, name),
            "output_node": getattr(node, "OUTPUT_NODE", False),
        }
    return {
        **info,
        "output": [_plain(kind) for kind in info["output"]],
        "output_name": [_plain(kind) for kind in info["output_name"]],
    }


def _plain(kind) -> str:
    """Older nodes name their types by members of an enum."""
    return str(getattr(kind, "value", kind))
