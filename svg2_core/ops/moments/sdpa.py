"""Moments for the sdpa backend: one head at a time, its keys in tiles of entire clusters that stay in a core's cache."""

import torch

from ..kmeans.metric import finite, leading_directions, second_moment
from ..segments import labels_in_order, segment_max, segment_mean, tiles_of_segments
from . import reference

_TILE = 2**18  # logits of a tile: 1 MB
_MOST_LOGIT = 80.0  # exp of more than 88 overflows in fp32


def moments(q, k, v, q_clusters, k_clusters, scale, directions):
    return reference.moments(q, k, v, q_clusters, k_clusters, scale, directions, of_head=_head)


def _head(q, k, v, q_order, q_offsets, q_centroids, k_order, k_offsets, k_centroids, scale, directions):
    d, c_q, c_k = k.shape[1], len(q_centroids), len(k_centroids)
    new = k_centroids.new_empty
    log_mass, variance, key_variances = new(c_k, c_q), new(c_k, c_q), new(c_k, d)
    values, spread, dk = new(c_k, d), new(c_k), new(k.shape)
    scaled = scale * q_centroids.T
    for rows, clusters in tiles_of_segments(k_offsets, max(1, _TILE // max(c_q, d))):
        offsets = k_offsets[clusters.start : clusters.stop + 1] - rows.start
        labels = labels_in_order(offsets)
        dk[rows] = keys = deviations(k, k_order[rows], labels, k_centroids[clusters])
        logits = keys @ scaled  # [keys, Cq]
        log_mass[clusters] = _log_mean_exp(logits, offsets, labels)
        variance[clusters] = segment_mean(logits.square_(), offsets)
        key_variances[clusters] = segment_mean(keys.square_(), offsets)
        tokens = v.index_select(0, k_order[rows]).float()
        values[clusters] = means = segment_mean(tokens, offsets)
        distances = (tokens - means.index_select(0, labels)).square_().sum(1, keepdim=True)
        spread[clusters] = segment_mean(distances, offsets)[:, 0].sqrt_()
    log_mass = torch.where(k_offsets.diff() > 0, log_mass.T, 0.0)

    # Queries deviate from their centroid, too: the joint part of the logits' variance.
    query_variances = new(c_q, d)
    for rows, clusters in tiles_of_segments(q_offsets, _TILE // d):
        offsets = q_offsets[clusters.start : clusters.stop + 1] - rows.start
        queries = deviations(q, q_order[rows], labels_in_order(offsets), q_centroids[clusters])
        query_variances[clusters] = segment_mean(queries.square_(), offsets)
    variance = torch.addmm(variance.T, query_variances, key_variances.T, alpha=scale**2)

    for_keys, for_queries = leading_directions(second_moment(dk), second_moment(finite(q)), directions)
    for_keys, for_queries = (x.float().to(k.device) for x in (scale * for_keys, for_queries))
    within = segment_mean((dk @ for_keys).square_(), k_offsets)
    return values, log_mass.contiguous(), variance, spread, for_queries, within


def deviations(x, order, labels, centroids):
    """Some tokens of `[N, D]` less their cluster's centroid, fp32 and finite: those at `order`, of clusters `labels`."""
    return finite(x.index_select(0, order)).sub_(centroids.index_select(0, labels))


def _log_mean_exp(logits, offsets, labels):
    """Of each segment's rows, by column: `[C, W]`."""
    tiny = torch.finfo(torch.float32).tiny
    if logits.numel() and logits.amax() < _MOST_LOGIT:  # about their mean, so that a segment's sum is no less than its size
        return segment_mean(logits.exp(), offsets).clamp_min_(tiny).log_()
    largest = segment_max(logits, offsets)
    mean = segment_mean((logits - largest.index_select(0, labels)).exp_(), offsets)
    return mean.clamp_min_(tiny).log_().add_(largest)
