"""Moments in plain torch, one head at a time: the definition that kernels are tested against."""

from functools import partial

import torch

from ..by_head import by_head
from ..kmeans.metric import finite, leading_directions, second_moment
from ..segments import labels_in_order, segment_max, segment_mean

# Logits held at once, in elements: 16 M are 64 MB.
_MAX_LOGITS = 16 * 2**20


def moments(q, k, v, q_clusters, k_clusters, scale, directions, of_head=None):
    """of_head: the implementation for one head, by default that below."""
    compute = partial(of_head or _head, scale=scale, directions=directions)
    return by_head(compute, q, k, v, *q_clusters, *k_clusters)


def _head(q, k, v, q_order, q_offsets, q_centroids, k_order, k_offsets, k_centroids, scale, directions):
    q_labels, k_labels = labels_in_order(q_offsets), labels_in_order(k_offsets)
    dk = finite(k[k_order.long()]) - k_centroids[k_labels]  # deviations, in cluster order
    v = v[k_order.long()].float()
    values = segment_mean(v, k_offsets)
    spread = segment_mean((v - values[k_labels]).square().sum(1, keepdim=True), k_offsets)[:, 0].sqrt()

    log_mass, variance = [], []
    for centroids in q_centroids.split(max(1, _MAX_LOGITS // len(k))):
        logits = (scale * dk) @ centroids.T  # [N, some of Cq]
        variance.append(segment_mean(logits.square(), k_offsets).T)
        largest = segment_max(logits, k_offsets)
        mean = segment_mean((logits - largest[k_labels]).exp_(), k_offsets)
        log_mass.append((mean.clamp_min(torch.finfo(torch.float32).tiny).log_() + largest).T)
    log_mass, variance = torch.cat(log_mass), torch.cat(variance)
    filled = k_offsets.diff() > 0
    log_mass = torch.where(filled, log_mass, 0.0)

    # Queries deviate from their centroid, too: the joint part of the logits' variance.
    dq = finite(q[q_order.long()]) - q_centroids[q_labels]
    per_channel = [segment_mean(d.square(), offsets) for d, offsets in ((dq, q_offsets), (dk, k_offsets))]
    variance += scale**2 * per_channel[0] @ per_channel[1].T

    for_keys, for_queries = leading_directions(second_moment(dk), second_moment(finite(q)), directions)
    for_keys, for_queries = (x.float().to(k.device) for x in (scale * for_keys, for_queries))
    within = segment_mean((dk @ for_keys).square(), k_offsets)
    return values, log_mass, variance, spread, for_queries, within
