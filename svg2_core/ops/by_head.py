"""The loop over rows and heads of the operations that torch computes one head at a time."""

from collections.abc import Callable

import torch


def by_head(compute: Callable, *tensors: torch.Tensor | None):
    """compute of each row and head of some tensors `[B, H, ...]` (None stays None), stacked: a tensor `[B, H, ...]`, or a tuple of
    them (or of None) as `compute` returns it.

    One head at a time, not one batched product: a library's products may round differently by the size of a batch.
    """
    b, h = tensors[0].shape[:2]
    heads = [compute(*(None if x is None else x[i, j] for x in tensors)) for i in range(b) for j in range(h)]
    if isinstance(heads[0], torch.Tensor):
        return torch.stack(heads).unflatten(0, (b, h))
    return tuple(None if part[0] is None else torch.stack(part).unflatten(0, (b, h)) for part in zip(*heads, strict=True))
