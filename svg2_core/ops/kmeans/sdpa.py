"""k-means for torch's own libraries, one head at a time: products over tiles that stay in a core's cache, sums by segments."""

import torch
import torch.nn.functional as F

from ..segments import segment_mean
from . import reference
from .metric import logit_spaces  # noqa: F401  (the operation's third function)

_TILE = 256  # tokens: with 1,000 clusters a tile of distances is 1 MB


def lloyd(x: torch.Tensor, init: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As reference.lloyd. Sums are fp32, of tokens about their mean."""
    heads = [[_head(x[i, j], init[i, j].float(), iterations) for j in range(x.shape[1])] for i in range(x.shape[0])]
    return tuple(torch.stack([torch.stack([head[part] for head in row]) for row in heads]) for part in range(3))


def lloyd_in(x, space, c, init, iterations, seed, role, first_head):
    """As reference.lloyd_in."""
    return reference.lloyd_in(x, space, c, init, iterations, seed, role, first_head, lloyd=lloyd, means=cluster_means)


def cluster_means(values: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    b, h = values.shape[:2]
    return torch.stack(
        [torch.stack([segment_mean(values[i, j].float(), offsets[i, j], order[i, j]) for j in range(h)]) for i in range(b)]
    )


def _head(x: torch.Tensor, means: torch.Tensor, iterations: int):
    # A channel more, so that a product adds the centroids' biases.
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
