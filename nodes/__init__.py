"""The ComfyUI side: the only room that may import comfy, comfy_api or server."""

from comfy_api.latest import ComfyExtension, io

from .compare import SVG2Compare
from .doctor import SVG2Doctor
from .fused_ops import SVG2FusedOps
from .report import SVG2Report
from .sparse_attention import SVG2SparseAttention
from .telling import any_folder, live


class SVG2Extension(ComfyExtension):
    """The pack's nodes, for ComfyUI's loader."""

    async def on_load(self) -> None:
        live.serve()
        any_folder.serve()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SVG2SparseAttention, SVG2Report, SVG2Compare, SVG2Doctor, SVG2FusedOps]
