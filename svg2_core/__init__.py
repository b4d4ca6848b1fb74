"""Semantic-aware sparse attention (Sparse VideoGen2, arXiv 2505.18875) with a far field of first order.

`svg2_attention` in `attention.py` is one call of the algorithm; `ops/` holds its five stages; a `Session` is a sampling run of such
calls, and `adapters/` hang it on other engines. Nothing here imports ComfyUI: the package works in any program that has queries, keys
and values.
"""

from .attention import AttentionResult, svg2_attention
from .config import SVG2Config
from .layout import Layout
from .presets import preset_config
from .reasons import Reason, Refusal
from .schedule import Schedule
from .session import Answer, CallSite, Session

__all__ = [
    "Answer",
    "AttentionResult",
    "CallSite",
    "Layout",
    "Reason",
    "Refusal",
    "SVG2Config",
    "Schedule",
    "Session",
    "preset_config",
    "svg2_attention",
]
