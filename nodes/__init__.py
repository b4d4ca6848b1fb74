"""The ComfyUI side: the only room that may import comfy, comfy_api or server."""

from comfy_api.latest import ComfyExtension, io

from .compare import SVG2Compare
from .doctor import SVG2Doctor
from .fused_ops import SVG2FusedOps
from .raylight import actors
from .report import SVG2Report
from .sparse_attention import SVG2SparseAttention
from .sparse_attention_ray import SVG2SparseAttentionRay
from .telling import any_folder, live

NODES = [SVG2SparseAttention, SVG2Report, SVG2Compare, SVG2Doctor, SVG2FusedOps, SVG2SparseAttentionRay]


class SVG2Extension(ComfyExtension):
    """The pack's nodes, for ComfyUI's loader."""

    async def on_load(self) -> None:
        live.serve()
        any_folder.serve()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for node in NODES if node is not SVG2SparseAttentionRay or actors.is_installed()]
