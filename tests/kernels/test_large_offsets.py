"""Tensors that reach past 2^31 elements: addresses are computed in 64 bits, whichever stride takes them there.

What the kernels address by other numbers than strides, test_compile.py checks in their compiled form.
"""

import cases
import pytest
import torch
from accuracy import errors
from large import REACH, ROOM
from svg2_pack.svg2_core import Layout
from svg2_pack.svg2_core.ops.kmeans import Clusters, cluster_means, kmeans
from svg2_pack.svg2_core.ops.near_field import near_field

B, H, N, D, C = 3, 3, 40, 48, 5
START, VIDEO = 14, 24  # text on both sides; the last of the video and the text after it are past 2^31

# Which of batch, head, token and dimension is the far one.
axes = pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["batch", "head", "token", "dimension"])


def far(memory, axis: int, tensors) -> list[torch.Tensor]:
    """Copies of `tensors` `[B, H, N, D]`, interleaved, whose elements are far apart along `axis` and dense otherwise."""
    views = []
    for place, x in enumerate(tensors):
        strides = list(x.movedim(axis, 0).contiguous().movedim(0, axis).stride())
        strides[axis] = REACH // (x.shape[axis] - 1)
        assert x.numel() < ROOM and strides[axis] > ROOM * len(tensors)
        view = memory.as_strided(x.shape, strides, 2**31 + place * ROOM)
        assert (view[-1, -1, -1, -1].data_ptr() - view.data_ptr()) // 2 > 2**31 > strides[axis]
        views.append(view.copy_(x))
    return views


def tensors(seed: int, count: int, device) -> list[torch.Tensor]:
    return list(torch.randn(count, B, H, N, D, generator=cases.generator(seed)).to(device, torch.float16))


def partition(seed: int, clusters: int, device) -> tuple[torch.Tensor, Clusters]:
    labels = cases.ragged_labels(cases.generator(seed), B, H, VIDEO, clusters).to(device)
    return labels, cases.clusters_of(labels, clusters)


@axes
def test_kmeans(backend, device, memory, axis):
    near = tensors(1, 1, device)
    (x,) = far(memory, axis, near)
    expected = kmeans(near[0], C, iterations=2, backend=backend)
    for result, truth in zip(kmeans(x, C, iterations=2, backend=backend), expected, strict=True):
        assert torch.equal(result, truth)


@axes
def test_cluster_means(backend, device, memory, axis):
    near = [x[:, :, :VIDEO] for x in tensors(2, 1, device)]
    (values,) = far(memory, axis, near)
    _, clusters = partition(3, C, device)
    assert torch.equal(cluster_means(values, clusters, backend=backend), cluster_means(near[0], clusters, backend=backend))


@axes
def test_near_field(backend, device, memory, axis):
    """With text before and after the video; q, k, v and the result are all far."""
    near = [*tensors(4, 3, device), torch.empty(B, H, N, D, dtype=torch.float16, device=device)]
    (q_labels, q_clusters), (k_labels, k_clusters) = partition(5, 4, device), partition(6, C, device)
    selected = cases.random_map(cases.generator(7), q_labels, k_labels, 4, C).to(device)
    bias = torch.randn(B, N - VIDEO, generator=cases.generator(9)).to(device)
    settings = {"layout": Layout(START, VIDEO, bias), "scale": 0.2, "backend": backend}
    places = far(memory, axis, near)
    sums = [near_field(q, k, v, q_clusters, k_clusters, selected, out=out, **settings)[1] for q, k, v, out in (near, places)]
    video = slice(START, START + VIDEO)
    assert torch.equal(places[3][:, :, video], near[3][:, :, video]) and torch.equal(*sums)
    # The text's queries are torch's own attention's, which takes another path where dimensions are not neighbours.
    assert errors(places[3], near[3].double())[0] <= torch.finfo(torch.float16).eps
