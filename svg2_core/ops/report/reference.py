"""A call's report in plain torch."""

import torch

from ...precision import widest


def exact_pairs(q_clusters, k_clusters, selected):
    keys = torch.where(selected, k_clusters.sizes[:, :, None], 0).sum(-1)
    # fp64: the count of pairs of 75,600 tokens exceeds fp32's precision.
    return (q_clusters.sizes.to(widest(keys.device)) * keys).sum(-1)


def summary(pairs, squares, expected_errors, all_pairs, rows):
    error, norm = squares.sum((0, 1), dtype=widest(squares.device))
    expected = None
    if expected_errors is not None:
        expected = ((expected_errors.square() * rows).sum(dtype=norm.dtype) / norm).sqrt().float()
    return (pairs.mean() / all_pairs).float(), (error / norm).sqrt().float(), expected
