"""The ComfyUI side: the only room that may import comfy, comfy_api or server."""

from comfy_api.latest import ComfyExtension, io

from .doctor import SVG2Doctor
from .sparse_attention import SVG2SparseAttention


class SVG2Extension(ComfyExtension):
    """The pack's nodes, for ComfyUI's loader."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SVG2SparseAttention, SVG2Doctor]
