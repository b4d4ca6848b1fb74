"""Per model family: which attention calls are video self-attention, and where the video tokens sit.

Wan is the only family so far: `detect_family` knows its class, `find_layout` reads its calls.
"""

import math
from dataclasses import dataclass, field

import torch

from ..svg2_core.layout import Layout
from ..svg2_core.reasons import Reason, Refusal


@dataclass
class ModelCall:
    """One evaluation of the diffusion model, as the DIFFUSION_MODEL wrapper sees it. Lives as long as the evaluation.

    video_tokens: tokens of the latent alone (references and contexts may add more);
    context_tokens: lengths of the text and image contexts, which cross-attention sees as its keys;
    uuids: of the conditionings whose chunks make up the batch, empty if they do not; window: of a context window.
    """

    step: int
    dense_step: Reason | None
    batch: int = 0
    video_tokens: int = 0
    context_tokens: frozenset[int] = frozenset()
    uuids: tuple = ()
    window: tuple | None = None
    seen: dict = field(default_factory=dict)  # self-attentions so far, by (block_type, block_index)
    delegating: bool = False  # a dense call is on its way through the overrides below ours


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


def find_layout(call: ModelCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask) -> Layout | Refusal:
    """Where the video tokens of q, k, v `[B, H, N, D]` sit, or why the call is not video self-attention.

    Wan: the whole sequence is video (references, where a variant has them, included); text comes by cross-attention.
    """
    batch, _, tokens, _ = q.shape
    if k.shape[2] != tokens or batch != call.batch or tokens < call.video_tokens:
        return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)
    if tokens in call.context_tokens:
        return Refusal(Reason.UNKNOWN_LAYOUT, f"{tokens} video tokens and as many of context cannot be told apart")
    if k.shape != q.shape or v.shape != q.shape:
        return Refusal(Reason.UNKNOWN_LAYOUT, "queries, keys and values differ in heads or width")
    if mask is not None:
        return Refusal(Reason.UNSUPPORTED_MASK)
    return Layout(video_start=0, video_len=tokens)
