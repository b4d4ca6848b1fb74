"""What newer hosts record of a block, so that they can repeat it: its allocations, or the whole of it as a CUDA graph."""

import contextlib
import sys

import torch


def pause_malloc_graph() -> contextlib.AbstractContextManager:
    """Allocations inside are not recorded. What is recorded must be freed by the block's end; ours may live longer."""
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    return contextlib.nullcontext() if pause is None else pause()


def recorded(device: torch.device) -> bool:
    """Whether the work given to this device now goes into a CUDA graph, to be repeated without us."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
