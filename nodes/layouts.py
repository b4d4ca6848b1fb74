"""Per model family: which attention calls are video self-attention, and where the video tokens sit.

A family is one entry: a test of the diffusion model's class, and a function that reads a call.
"""

import math
from dataclasses import dataclass, field

import torch

from ..svg2_core.layout import Layout
from ..svg2_core.reasons import Reason


@dataclass
class ModelCall:
    """One evaluation of the diffusion model, as the DIFFUSION_MODEL wrapper sees it. Lives as long as the evaluation.

    video_tokens: tokens of the latent alone (references and contexts may add more);
    context_tokens: lengths of the text and image contexts, which cross-attention sees as its keys.
    """

    step: int
    dense_step: Reason | None
    batch: int
    video_tokens: int
    context_tokens: frozenset[int]
    uuids: tuple
    window: tuple | None
    seen: dict = field(default_factory=dict)  # self-attentions so far, by (block_type, block_index)
    delegating: bool = False  # a dense call is on its way through the overrides below ours


@dataclass(frozen=True)
class Refusal:
    """Why a call is not for SVG2."""

    reason: Reason
    detail: str = ""


def detect_family(model) -> str | None:
    """The family of a ModelPatcher's model (a key of svg2_core's presets), or None if its layout is not known."""
    from comfy.ldm.wan.model import WanModel

    network = model.get_model_object("diffusion_model")
    if isinstance(network, WanModel):
        # Image-to-video checkpoints take the image as extra input channels.
        return "wan_i2v" if network.in_dim > network.out_dim else "wan_t2v"
    return None


def video_tokens(latent_shape: torch.Size, patch_size: tuple[int, int, int]) -> int:
    """Tokens of a latent `[B, C, T, H, W]` cut into patches, padded up to whole patches."""
    return math.prod(math.ceil(n / p) for n, p in zip(latent_shape[2:], patch_size, strict=True))


def find_layout(family: str | None, call: ModelCall, q: torch.Tensor, k: torch.Tensor, mask) -> Layout | Refusal:
    """Where the video tokens of q, k `[B, H, N, D]` sit, or why the call is not video self-attention."""
    if family is None:
        return Refusal(Reason.UNKNOWN_LAYOUT, "supported are Wan 2.1 and 2.2")
    return _wan(call, q, k, mask)


def _wan(call: ModelCall, q: torch.Tensor, k: torch.Tensor, mask) -> Layout | Refusal:
    """Wan: the whole sequence is video (references, where a variant has them, included); text comes by cross-attention."""
    batch, _, tokens, _ = q.shape
    if k.shape[2] != tokens or batch != call.batch or tokens < call.video_tokens:
        return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)
    if tokens in call.context_tokens:
        return Refusal(Reason.UNKNOWN_LAYOUT, f"{tokens} video tokens and as many of context cannot be told apart")
    if k.shape[1] != q.shape[1]:
        return Refusal(Reason.UNKNOWN_LAYOUT, "fewer key heads than query heads")
    if mask is not None:
        return Refusal(Reason.UNSUPPORTED_MASK)
    return Layout(video_start=0, video_len=tokens)
