"""k-means in plain torch, one head at a time: the definition that kernels are tested against."""

import torch

from ..by_head import by_head
from .cold_start import cold_start
from .metric import finite, logit_spaces, points_in  # noqa: F401  (logit_spaces is the operation's third function)

# Tokens per distance matrix: 8192 x 1000 clusters are 33 MB.
_CHUNK = 8192


def lloyd(x: torch.Tensor, init: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`iterations` rounds of assignment and update; order, offsets and centroids as in `Clusters`."""

    def of_head(x, means):
        means = means.float()
        for _ in range(iterations):
            order, offsets = _group(_assign(x, means), len(means))
            means = _means(x, order, offsets, means)
        return order, offsets, means

    return by_head(of_head, x, init)


def lloyd_in(x, space, c, init, iterations, seed, role, first_head, lloyd=lloyd, means=None):
    """See `kmeans_in`: order, offsets, means, points. lloyd, means: their implementations, by default those here."""
    points = points_in(x, space)
    if init is None:
        init = cold_start(points, c, seed=seed, role=role, first_head=first_head)
    else:
        init = by_head(lambda past, transfer: past.float() @ transfer, init, space.transfer)
    order, offsets, found = lloyd(points, init, iterations)
    return order, offsets, finite((means or cluster_means)(x, order, offsets)), found


def cluster_means(values: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    zeros = values.new_zeros(offsets.shape[-1] - 1, values.shape[-1], dtype=torch.float32)
    return by_head(lambda x, order, offsets: _means(x, order, offsets, zeros), values, order, offsets)


def _assign(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Nearest centroid of each token of `x` `[N, D]`, int64 `[N]`; ties go to the lower cluster."""
    # With c = m + e: |x - c|^2 = |x - m|^2 + (|e|^2 + 2 m.e) - 2 x.e. Relative to their mean m, centroids with a large common
    # offset neither lose their differences to the input's precision nor cancel in the products.
    origin = centroids.mean(0)
    limit = torch.finfo(x.dtype).max
    centred = (centroids - origin).clamp(-limit, limit).to(x.dtype).float()  # the precision of a kernel's tensor cores
    bias = (centred * (centred + 2 * origin)).sum(-1)
    return torch.cat([(bias - 2 * (part.float() @ centred.T)).argmin(-1) for part in x.split(_CHUNK)])


def _group(labels: torch.Tensor, n_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens grouped by label (ascending within a group) and the groups' offsets."""
    sorted_labels, order = labels.sort(stable=True)
    bounds = torch.arange(n_clusters + 1, device=labels.device)
    return order.int(), torch.searchsorted(sorted_labels, bounds).int()


def _means(x: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, when_empty: torch.Tensor) -> torch.Tensor:
    """Mean of each group's rows of `x` `[N, D]`, fp32; summed in fp64: one by one in fp32, roundings add up to 7e-4."""
    sizes = offsets.diff()
    sums = torch.segment_reduce(x[order.long()].double(), "sum", lengths=sizes.long(), axis=0, unsafe=True, initial=0)
    return torch.where(sizes[:, None] > 0, (sums / sizes[:, None].clamp(min=1)).float(), when_empty)
