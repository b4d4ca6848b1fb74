"""SVG2 for ComfyUI: sparse video attention in one node. See README.md."""

WEB_DIRECTORY = "web"


async def comfy_entrypoint():
    # Imported here, not above: importing this file must cost nothing and need no ComfyUI (pytest collects it).
    from .nodes import SVG2Extension

    return SVG2Extension()
