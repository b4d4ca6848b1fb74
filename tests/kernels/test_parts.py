"""Calls whose queries are a part of the sequence: one frame, or one window, over all keys."""

import cases
import pytest
import torch
import torch.nn.functional as F
from svg2_pack.svg2_core import Layout, SVG2Config, attention, svg2_attention

N, D, PARTS = 360, 64, 3
SETTINGS = {"q_clusters": 18, "k_clusters": 36, "density": 0.2, "kmeans_init_iters": 4}


def tokens(text=0, seed=3):
    """q, k, v of the video, with `text` further keys behind it: attention spread over directions that fall off."""
    g = cases.generator(seed)
    q, k = torch.randn(2, 1, 2, N + text, D, generator=g) * (3.5 * 0.93 ** torch.arange(D))
    return q, k, k @ (torch.randn(2, D, D, generator=g) / D**0.5) + torch.randn(1, 2, N + text, D, generator=g)


def dense(q, k, v):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


def parts(q):
    return q[:, :, :N].split(N // PARTS, dim=2)


def layout():
    return Layout(0, N, queries=(0, N // PARTS))


def call(backend, part, k, v, past=None, keys=None, **settings):
    return svg2_attention(part, k, v, layout(), SVG2Config(**{**SETTINGS, **settings}), past, backend=backend, keys=keys)


def error(out, truth):
    return ((out.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("text", [0, 40], ids=["video_only", "with_text"])
def test_all_selected_is_dense(backend, text):
    q, k, v = tokens(text)
    first, second, _ = parts(q)
    result = call(backend, first, k, v, density=1.0)
    again = call(backend, second, k, v, keys=result.keys, density=1.0)
    for out, part in ((result.out, first), (again.out, second)):
        assert error(out, dense(part, k, v)) <= 3e-6
    assert result.density.item() == pytest.approx(1.0)


def test_parts_are_as_near_to_dense_as_the_whole(backend):
    """At the same density, with the keys in the clusters that the first part made of them."""
    q, k, v = tokens()
    whole = svg2_attention(q, k, v, Layout(0, N), SVG2Config(**SETTINGS), backend=backend)
    results, keys = [], None
    for part in parts(q):
        results.append(call(backend, part, k, v, keys=keys))
        keys = results[0].keys
    truth = dense(q, k, v)
    apart = error(torch.cat([result.out for result in results], 2), truth)
    assert apart <= 1.25 * error(whole.out, truth)
    for result, expected in zip(results, truth.split(N // PARTS, dim=2), strict=True):
        assert 0.9 * SETTINGS["density"] <= result.density.item() <= SETTINGS["density"]
        assert result.error.item() == pytest.approx(error(result.out, expected), rel=0.5)  # on a few rows


def test_a_part_is_its_own_business(backend):
    """Given the keys' clusters, the order in which parts ask changes no bit; nor is there anything else of an earlier part."""
    q, k, v = tokens()
    first, second, third = parts(q)
    keys = call(backend, first, k, v).keys
    alone = call(backend, third, k, v, keys=keys).out
    call(backend, second, k, v, keys=keys)
    assert torch.equal(call(backend, third, k, v, keys=keys).out, alone)


def test_keys_are_clustered_once(backend, monkeypatch):
    q, k, v = tokens()
    roles, real = [], attention.cluster.__globals__["kmeans_in"]
    monkeypatch.setitem(attention.cluster.__globals__, "kmeans_in", lambda *args, role, **of: roles.append(role) or real(*args, role=role, **of))
    keys = None
    for part in parts(q):
        keys = call(backend, part, k, v, keys=keys).keys
    heads = 2 if backend == "sdpa" else 1  # which answers each by itself
    assert sorted(roles) == sorted(heads * [0, 1, 0, 0])


def test_a_part_goes_on_from_its_own_past(backend):
    """Its queries' clusters need few iterations then: from the past, one is as good as many from a cold start."""
    q, k, v = tokens()
    part = parts(q)[1]
    keys = call(backend, parts(q)[0], k, v).keys
    cold = call(backend, part, k, v, keys=keys, kmeans_init_iters=12)
    [past] = cold.centroids
    assert past.k is None and past.k_projection is None, "the keys' are the first part's"
    warm = call(backend, part, k, v, [past], keys, kmeans_iters=1)
    truth = dense(part, k, v)
    assert error(warm.out, truth) <= 1.1 * error(cold.out, truth)


def test_heads_in_chunks(backend):
    """The clusters of keys are known by their heads: of other heads than asked for they are made anew."""
    q, k, v = tokens()
    first, second, _ = parts(q)
    of = {"backend": backend, "heads_at_a_time": 1}
    config = SVG2Config(**SETTINGS)
    keys = svg2_attention(first, k, v, layout(), config, **of).keys
    assert list(keys) == [(0, 1), (1, 2)]
    out = svg2_attention(second, k, v, layout(), config, keys=keys, **of).out
    together = svg2_attention(second, k, v, layout(), config, keys=call(backend, first, k, v).keys, backend=backend).out
    assert error(out, together.double()) <= 1e-6


@pytest.mark.parametrize(
    "change, named",
    [({"queries": None}, "120 queries over 360 keys"), ({"queries": (0, 121)}, "120 queries"), ({"queries": (-1, 3)}, "queries")],
)
def test_bad_input_is_named(backend, change, named):
    q, k, v = tokens()
    with pytest.raises(ValueError, match=named):
        svg2_attention(parts(q)[0], k, v, Layout(0, N, **change), SVG2Config(**SETTINGS), backend=backend)
