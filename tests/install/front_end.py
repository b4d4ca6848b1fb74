"""What the front end gets of the pack from a running ComfyUI, asked for at the addresses that the front end uses."""

import re
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "SVG2"  # of the names of the pack's nodes


@dataclass
class Sight:
    nodes: dict[str, str] = field(default_factory=dict)  # node -> the module that ComfyUI says it is from
    scripts: list[str] = field(default_factory=list)  # addresses of the scripts of custom nodes, all served
    help: dict[str, str] = field(default_factory=dict)  # node -> its help page
    words: dict[str, dict] = field(default_factory=dict)  # language -> what custom nodes add to it
    templates: dict[str, list[str]] = field(default_factory=dict)  # folder of custom_nodes -> workflows, all served
    missing: list[str] = field(default_factory=list)  # addresses that the front end would ask for in vain


async def look(server) -> Sight:
    sight = Sight()
    nodes = {name: about for name, about in (await server.get("/object_info")).items() if name.startswith(PREFIX)}
    for name, about in nodes.items():
        sight.nodes[name] = about["python_module"]
        # extractCustomNodeName of the front end: what is between the first two dots, up to an @.
        folder = about["python_module"].split(".")[1].split("@")[0]
        sight.help[name] = await _text(server, f"/extensions/{folder}/docs/{name}.md", sight)
    for address in await server.get("/extensions"):
        if not address.startswith("/extensions/core/"):
            sight.scripts.append(address)
            await _text(server, address, sight)
    sight.words = {language: words for language, words in (await server.get("/i18n")).items() if words}
    sight.templates = await server.get("/workflow_templates")
    for folder, names in sight.templates.items():
        for name in names:
            await _text(server, f"/api/workflow_templates/{folder}/{name}.json", sight)
    return sight


async def _text(server, address: str, sight: Sight) -> str:
    async with server.session.get(server.url + address) as response:
        if response.status != 200:
            sight.missing.append(f"{response.status} {address}")
            return ""
        return await response.text()


def nodes_of(pack: Path) -> set[str]:
    """The nodes that the pack in this folder registers, by its source: their classes have the names of the nodes."""
    source = (pack / "nodes" / "__init__.py").read_text(encoding="utf-8")
    listed = set(re.findall(r"\w+", re.search(r"^NODES = \[(.*?)\]", source, re.DOTALL | re.MULTILINE).group(1)))
    return listed - {"SVG2SparseAttentionRay"}  # there is no Raylight


def mentions(log: str, *folders: Path) -> list[str]:
    """The lines of ComfyUI's log that the pack wrote, or that name one of these folders: a pack that is not loaded has none.
    (Its mere name is in the log wherever ComfyUI itself lies below a folder of that name.)"""
    plain = re.sub(r"\x1b\[[\d;]*m", "", log).splitlines()
    written = re.compile(r"(\[\w+\] )?\[?SVG2\b")  # after the level, which is in colours
    return [line for line in plain if written.match(line) or any(str(folder) in line for folder in folders)]


def complaints(log: str) -> list[str]:
    """The lines of ComfyUI's log that say a custom node could not be loaded, or that something failed."""
    signs = ("Traceback", "IMPORT FAILED", "Cannot import", "Error while calling comfy_entrypoint", "due to the lack of")
    return [line for line in log.splitlines() if any(sign in line for sign in signs)]
