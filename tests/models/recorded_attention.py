"""Queries, keys and values as the shipped checkpoint makes them while it samples the demo's video."""

import contextlib

import torch

BLOCKS = (1, 3, 5)
STEPS = (4, 10, 16)  # of 20


class Enough(Exception):
    """The last call that was asked for is recorded: sampling need not go on."""


def record(patcher, case=None, blocks=BLOCKS, steps=STEPS) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k, v `[1, H, N, D]` of `blocks` at `steps` of a dense 20-step sample, one tuple per call."""
    import demo_video

    recorded, evaluation = [], [-1]

    def recorder(func, q, k, v, heads, **kwargs):
        block = kwargs["transformer_options"]["block_index"]
        if q.shape == k.shape:
            if block == 0:
                evaluation[0] += 1
                if evaluation[0] > max(steps):
                    raise Enough
            if block in blocks and evaluation[0] in steps:
                recorded.append(tuple(x.unflatten(-1, (heads, -1)).transpose(1, 2).clone() for x in (q, k, v)))
        return func(q, k, v, heads, **kwargs)

    patcher = patcher.clone()
    patcher.model_options["transformer_options"]["optimized_attention_override"] = recorder
    with contextlib.suppress(Enough):
        demo_video.sample(patcher, case=case)
    return recorded
