"""SVG2 for ComfyUI: sparse video attention in one node. See README.md."""

import logging
import re
import sys

WEB_DIRECTORY = "web"
OLDEST_COMFYUI = "0.16.3"  # that the tests run in


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _too_old() -> str:
    """A sentence if the ComfyUI that loads this is too old, else nothing. Nothing is imported for it: ComfyUI has its version."""
    version = getattr(sys.modules.get("comfyui_version"), "__version__", "")
    if not _numbers(version) or _numbers(version) >= _numbers(OLDEST_COMFYUI):
        return ""
    return f"SVG2 needs ComfyUI {OLDEST_COMFYUI} or newer, and this is {version}: update ComfyUI. Until then its nodes are absent."


TOO_OLD = _too_old()
if TOO_OLD:
    logging.getLogger("svg2").error(TOO_OLD)


async def comfy_entrypoint():
    # Imported here, not above: importing this file must cost nothing and need no ComfyUI (pytest collects it).
    if TOO_OLD:
        from comfy_api.latest import ComfyExtension

        class Absent(ComfyExtension):
            async def get_node_list(self) -> list:
                return []

        return Absent()
    from .nodes import SVG2Extension

    return SVG2Extension()
