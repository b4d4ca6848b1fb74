"""A device short of memory, in the place of `svg2_core.session.svg2_attention`."""

import torch


def short_of_memory(whole, heads: int = 0) -> tuple:
    """(`whole` where memory is enough for so many heads at a time, how many were asked for in each call; None is all)"""
    asked = []

    def short(*args, heads_at_a_time=None, **kwargs):
        asked.append(heads_at_a_time)
        if heads_at_a_time is None or heads_at_a_time > heads:
            raise torch.OutOfMemoryError("CUDA out of memory\nat all")
        return whole(*args, heads_at_a_time=heads_at_a_time, **kwargs)

    return short, asked
