"""The demo checkpoint's stand-in for a text encoder: every prompt is one fixed random vector.

Wan's text encoder (umT5-XXL) is an 11 GB download. The demo model knows three prompts, the names of the clips it was
trained on; any other text gives a vector it has never seen.
"""

import hashlib

import torch

TEXT_WIDTH = 4096
PROMPTS = ("bunny", "bikes", "carphone")


def prompt_vector(prompt: str) -> torch.Tensor:
    """Map a prompt to its text embedding, fp32 `[1, 1, 4096]`; the empty prompt is all zeros."""
    prompt = prompt.strip().lower()
    if not prompt:
        return torch.zeros(1, 1, TEXT_WIDTH)
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "little", signed=False) % 2**63
    return torch.randn(1, 1, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))
