"""k-means for the sdpa backend, one head at a time: products over tiles that stay in a core's cache, segmented sums."""

import torch
import torch.nn.functional as F

from ..by_head import by_head
from ..segments import segment_mean
from . import reference
from .metric import logit_spaces  # noqa: F401  (the operation's third function)

_TILE = 256  # tokens: with 1,000 clusters a tile of distances is 1 MB


def lloyd(x: torch.Tensor, init: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As reference.lloyd. Sums are fp32, of tokens about their mean."""
    return by_head(lambda x, means: _head(x, means.float(), iterations), x, init)


def lloyd_in(x, space, c, init, iterations, seed, role, first_head):
    """As reference.lloyd_in."""
    return reference.lloyd_in(x, space, c, init, iterations, seed, role, first_head, lloyd=lloyd, means=cluster_means)


def cluster_means(values: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return by_head(lambda x, order, offsets: segment_mean(x.float(), offsets, order), values, order, offsets)


def _head(x: torch.Tensor, means: torch.Tensor, iterations: int):
    # Padded by a channel of ones, so that a product adds the centroids' biases.
    points = torch.cat([x.float(), torch.ones_like(x[:, :1], dtype=torch.float32)], 1)
    for _ in range(iterations):
        labels = _assign(points, means, x.dtype)
        order = labels.to(torch.int32).sort(stable=True).indices
        offsets = F.pad(torch.bincount(labels, minlength=len(means)).cumsum(0), (1, 0))
        # An empty cluster keeps its centroid.
        found = segment_mean(points, offsets, order)[:, :-1]
        means = torch.where((offsets.diff() > 0)[:, None], found, means)
    return order.int(), offsets.int(), means


def _assign(points: torch.Tensor, centroids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As reference._assign, on points `[N, D + 1]` fp32 that came in `dtype`."""
    origin = centroids.mean(0)
    limit = torch.finfo(dtype).max
    centred = (centroids - origin).clamp(-limit, limit).to(dtype).float()
    bias = (centred * (centred + 2 * origin)).sum(-1)
    targets = torch.cat([-2 * centred, bias[:, None]], 1).T
    # min, not argmin: it is twice as fast on a CPU.
    return torch.cat([torch.mm(part, targets).min(-1).indices for part in points.split(_TILE)])
