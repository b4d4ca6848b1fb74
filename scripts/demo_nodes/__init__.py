"""ComfyUI nodes that only the demo needs: its conditioning, its decoder, and a node that hands results to demo.py."""


async def comfy_entrypoint():
    from .nodes import DemoExtension

    return DemoExtension()
