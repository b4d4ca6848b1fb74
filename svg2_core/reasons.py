"""The reasons for which a call runs dense: each has a name for counters and a sentence for people."""

from dataclasses import dataclass
from enum import Enum


class Reason(str, Enum):
    """Reasons for handing a call to the attention the host would have used.

    Their names are in saved reports: NO_RUN and DISABLED, which nothing gives any more, stay for those.
    """

    NOT_VIDEO_SELF_ATTENTION = "not_video_self_attention"
    UNKNOWN_LAYOUT = "unknown_layout"
    NO_RUN = "no_run"
    WARMUP = "warmup"
    PAST_END = "past_end"
    DENSE_BLOCK = "dense_block"
    SHORT_SEQUENCE = "short_sequence"
    UNSUPPORTED_MASK = "unsupported_mask"
    UNSUPPORTED_HEAD_DIM = "unsupported_head_dim"
    UNSUPPORTED_DTYPE = "unsupported_dtype"
    UNSUPPORTED_DEVICE = "unsupported_device"
    NO_BACKEND = "no_backend"
    KERNEL_FAILED = "kernel_failed"
    OUT_OF_MEMORY = "out_of_memory"
    NEVER_CAME = "never_came"
    GRADIENTS = "gradients"
    RECORDED = "recorded"
    DISABLED = "disabled"

    @property
    def sentence(self) -> str:
        """What to tell the user."""
        return _SENTENCES[self]

    @property
    def expected(self) -> bool:
        """True where the settings ask for a dense call; False where the user should know that SVG2 could not run."""
        return self in _EXPECTED


_SENTENCES = {
    Reason.NOT_VIDEO_SELF_ATTENTION: "not a self-attention over the video tokens (cross-attention, text)",
    Reason.UNKNOWN_LAYOUT: "this model's token layout is not known to SVG2",
    Reason.NO_RUN: "attention was called outside a sampling run",
    Reason.WARMUP: "warm-up: the first sampling steps stay dense",
    Reason.PAST_END: "past end_percent of the sampling progress",
    Reason.DENSE_BLOCK: "the block is listed in dense_blocks",
    Reason.SHORT_SEQUENCE: "the sequence is shorter than min_tokens, or than a cluster count",
    Reason.UNSUPPORTED_MASK: "the attention mask is more than a key-padding mask on text tokens",
    Reason.UNSUPPORTED_HEAD_DIM: "no backend supports this head dimension",
    Reason.UNSUPPORTED_DTYPE: "no backend supports this data type",
    Reason.UNSUPPORTED_DEVICE: "no backend supports this device",
    Reason.NO_BACKEND: "no backend for sparse attention is available here",
    Reason.KERNEL_FAILED: "a kernel failed and was retired; see the log for its error",
    Reason.OUT_OF_MEMORY: "not enough memory for the sparse call",
    Reason.NEVER_CAME: "blocks ran, but their attention over the video never came to SVG2: another node computes it itself, or in parts",
    Reason.GRADIENTS: "gradients are asked for, which sparse attention does not have",
    Reason.RECORDED: "the host records this block as a CUDA graph, which would repeat one step's choice in every later step",
    Reason.DISABLED: "the node is disabled",
}

_EXPECTED = {
    Reason.NOT_VIDEO_SELF_ATTENTION,
    Reason.WARMUP,
    Reason.PAST_END,
    Reason.DENSE_BLOCK,
    Reason.DISABLED,
}


@dataclass(frozen=True)
class Refusal:
    """Why SVG2 or one of its backends does not take a call: the reason to count, and what to show beside its sentence."""

    reason: Reason
    detail: str = ""
