"""Every model family and variant in the real host: sparse equals dense where it must, and each call is what it says.

`python scripts/test.py -m models` prints a row for each variant.
"""

import brute_force
import pytest
import tiny_models
import torch
from svg2_pack.svg2_core import attention as algorithm
from svg2_pack.svg2_core.metrics import rel_l2

pytestmark = pytest.mark.models

EVERYWHERE = {"min_tokens": 0, "warmup_steps": 0, "dense_blocks": ""}
STEPS = 2


# As parameters: the tests of one variant stay together, so that its model is made once.
VARIANTS = [pytest.param(v, id=v.name, marks=pytest.mark.xdist_group(v.name)) for v in tiny_models.VARIANTS]


@pytest.fixture(scope="module", params=VARIANTS)
def made(host, request):
    """(variant, its model, its dense sample)"""
    model = request.param.build()
    return request.param, model, tiny_models.sample(request.param, model, steps=STEPS)


def run(variant, model, **inputs):
    """-> (sample, report) of the node with every block and step open to it."""
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    patched, stats = SVG2SparseAttention.execute(model, **EVERYWHERE, **inputs).result
    return tiny_models.sample(variant, patched, steps=STEPS), stats.latest()


def test_equals_dense_with_everything_selected(made, record_property):
    variant, model, dense = made
    sample, report = run(variant, model, top_p=1.0)
    error = rel_l2(sample, dense)
    record_property("models", {"variant": variant.name, "tokens": report.tokens, "sparse": report.sparse_calls,
                               "dense": report.dense_calls, "top_p = 1": error})  # fmt: skip
    assert error <= 1e-4
    assert report.sparse_calls == STEPS * variant.blocks and report.dense_calls == {}
    assert report.tokens == variant.tokens - sum(variant.text)


@pytest.mark.parametrize("compensation", ["off", "centroid"])
def test_each_sparse_call_is_what_its_clusters_and_map_say(made, compensation, monkeypatch, record_property):
    """Against a dense masked matrix, with stand-ins made anew from the members of each cluster, in fp64."""
    variant, model, dense = made
    calls = record_calls(monkeypatch)
    sample, report = run(variant, model, top_p=0.9, compensation=compensation)
    assert len(calls) == report.sparse_calls == STEPS * variant.blocks
    errors = [rel_l2(out, independent(*call, compensation)) for *call, out in calls]
    record_property("models", {"variant": variant.name, f"calls, {compensation}": max(errors)})
    assert max(errors) <= 1e-5
    assert report.density < 0.95 and rel_l2(sample, dense) > 1e-4, "nothing was skipped: this proves nothing"


def record_calls(monkeypatch) -> list:
    """Fills with (q, k, v, layout, scale, query clusters, key clusters, map, result) of each sparse call."""
    calls = []

    def watched(q, k, v, q_clusters, k_clusters, block_map, *, layout, scale, **kwargs):
        inputs = q.clone(), k.clone(), v.clone()  # some models compute in place
        out = attend(q, k, v, q_clusters, k_clusters, block_map, layout=layout, scale=scale, **kwargs)
        calls.append((*inputs, layout, scale, q_clusters, k_clusters, block_map, out.clone()))
        return out

    attend = algorithm.dynamic_attention
    monkeypatch.setattr(algorithm, "dynamic_attention", watched)
    return calls


def independent(q, k, v, layout, scale, q_clusters, k_clusters, block_map, compensation) -> torch.Tensor:
    q_labels, k_labels = labels(q_clusters), labels(k_clusters)
    tail = None
    if compensation == "centroid":
        video = slice(layout.video_start, layout.video_start + layout.video_len)
        heads = [
            [stand_ins(k[i, j, video], v[i, j, video], k_labels[i, j], block_map.shape[3]) for j in range(k.shape[1])]
            for i in range(k.shape[0])
        ]
        tail = tuple(torch.stack([torch.stack([head[part] for head in row]) for row in heads]) for part in range(3))
    keys, values, bias = brute_force.pairs(
        q, k, v, q_labels, k_labels, block_map, layout.video_start, layout.text_bias, tail
    )
    return brute_force.attention(q, keys, values, bias, scale)


def stand_ins(k, v, key_labels, clusters: int):
    """Of one head: mean key, mean value, log of the size (an empty cluster weighs nothing)."""
    sizes = torch.bincount(key_labels, minlength=clusters)
    return brute_force.means(k, key_labels, clusters), brute_force.means(v, key_labels, clusters), sizes.double().log()


def labels(clusters) -> torch.Tensor:
    """Which cluster each token is in `[B, H, N]`, from the order and the offsets."""
    b, h, n = clusters.order.shape
    out = torch.full((b, h, n), -1, dtype=torch.long)
    for i in range(b):
        for j in range(h):
            for c, (first, last) in enumerate(zip(clusters.offsets[i, j, :-1], clusters.offsets[i, j, 1:], strict=True)):
                out[i, j, clusters.order[i, j, first:last].long()] = c
    assert (out >= 0).all()
    return out
