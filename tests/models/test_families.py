"""Every model family and variant in the real host: sparse equals dense where it must, and each call is what it says.

Each variant once in every run: with everything selected, and sparse as the node is. `python scripts/test.py -m models` has the other rule
and the other two far fields of every variant too, which else are those of one variant for each place that a video has in its sequence
(SETTINGS_OF, see conftest.py), and prints a row for each variant.
"""

import threading
from dataclasses import dataclass

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
VARIANTS = [
    pytest.param(v, id=v.name, marks=pytest.mark.xdist_group(v.name)) for v in [*tiny_models.VARIANTS, tiny_models.ANIMATE_2]
]


# All of it; nothing but parts, frame by frame; after text that is padded; parts under a mask; before text; after text; at the end.
SETTINGS_OF = ("wan2.1 t2v", "wan animate 2", "hunyuan_video t2v padded", "ltxv guide", "mochi t2v", "cogvideox t2v", "minimax r2v references")
IN_EVERY_RUN = {"rule": "density", "compensation": "first_order"}  # of all variants


@pytest.fixture(scope="module", params=VARIANTS)
def made(host, request):
    """(variant, its model, its dense sample)"""
    model = tiny_models.build_or_skip(request.param)
    return request.param, model, tiny_models.sample(request.param, model, steps=STEPS)


def run(variant, model, **inputs):
    """-> (sample, report) of the node with every block and step open to it."""
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    patched, stats = SVG2SparseAttention.execute(model, **EVERYWHERE, **inputs).result
    return tiny_models.sample(variant, patched, steps=STEPS), stats.latest()


@pytest.mark.parametrize("rule", ["density", "top_p"])
def test_equals_dense_with_everything_selected(made, rule, record_property):
    variant, model, dense = made
    sample, report = run(variant, model, **{rule: 1.0})
    error = rel_l2(sample, dense)
    record_property("models", {"variant": variant.name, "tokens": report.tokens, "sparse": report.sparse_calls,
                               "dense": report.dense_calls, f"{rule} = 1": error})  # fmt: skip
    assert error <= 1e-4
    assert report.sparse_calls == STEPS * variant.blocks and report.dense_calls == {}
    assert report.tokens == variant.tokens - sum(variant.text)


@pytest.mark.parametrize("compensation", ["off", "centroid", "first_order"])
def test_each_sparse_call_is_what_its_clusters_map_and_moments_say(made, compensation, monkeypatch, record_property):
    """Against fp64: the near field against a dense masked matrix, the moments from the members of each cluster, the far field
    from its definition, and both merged in one softmax."""
    variant, model, dense = made
    calls = record_calls(monkeypatch)
    rule = {"density": 0.3} if compensation == "first_order" else {"top_p": 0.9}
    sample, report = run(variant, model, compensation=compensation, **rule)
    assert sum(call.first_head == 0 for call in calls) == report.sparse_calls == STEPS * variant.blocks
    errors = [max(call.errors(order={"off": None, "centroid": 0, "first_order": 1}[compensation])) for call in calls]
    record_property("models", {"variant": variant.name, f"calls, {compensation}": max(errors)})
    assert max(errors) <= 1e-5
    assert report.density < 0.95 and rel_l2(sample, dense) > 1e-4, "nothing was skipped: this proves nothing"


@dataclass
class Call:
    """What one sparse call did for some of its heads, as its stages were given it and gave it."""

    first_head: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: object
    scale: float
    q_clusters: object
    k_clusters: object
    selected: torch.Tensor
    near: torch.Tensor
    logsumexp: torch.Tensor
    moments: object = None
    share: torch.Tensor | None = None
    out: torch.Tensor | None = None

    def errors(self, order: int | None):
        """Relative L2 errors against fp64 of the near field, of the moments, and of the result."""
        q_labels, k_labels = labels(self.q_clusters), labels(self.k_clusters)
        queries, tokens = self.layout.video_queries, self.layout.video
        keys, values, bias = brute_force.pairs(
            self.q, self.k, self.v, q_labels, k_labels, self.selected, tokens.start, self.layout.text_bias, q_start=queries.start
        )
        near = brute_force.attention(self.q, keys, values, bias, self.scale)
        yield rel_l2(self.near, near)
        if order is None:
            assert self.out is None
            return
        truth, total = near.clone(), brute_force.logsumexp(self.q, keys, bias, self.scale)
        for i in range(len(self.q)):
            for j in range(self.q.shape[1]):
                video = self.q[i, j, queries], self.k[i, j, tokens], self.v[i, j, tokens]
                known = None
                if order == 1:
                    known = [x[i, j] for x in self.moments]
                    expected = brute_force.moments(*video, q_labels[i, j], k_labels[i, j], *self.selected.shape[2:], self.scale)
                    for mine, theirs in zip(known, expected, strict=False):
                        yield (mine - theirs).abs().max().item() / max(1, theirs.abs().max().item())
                    known = known[1], *known[4:]
                far = brute_force.far_field(*video, q_labels[i, j], k_labels[i, j], self.selected[i, j], self.scale, order, known)
                truth[i, j, queries] = brute_force.merged(near[i, j, queries], total[i, j, queries], far, self.share[i, j].double())
        yield rel_l2(self.out, truth)


def record_calls(monkeypatch) -> list[Call]:
    """Fills with each sparse call, in as many parts as it was answered in: heads side by side come from several threads."""
    calls, this = [], threading.local()

    def watched_cluster(*args, first_head, **kwargs):
        this.first_head = first_head
        return cluster(*args, first_head=first_head, **kwargs)

    def watched_near(q, k, v, q_clusters, k_clusters, selected, *, layout, scale, **kwargs):
        inputs = q.clone(), k.clone(), v.clone()  # some models compute in place
        out, logsumexp = near(q, k, v, q_clusters, k_clusters, selected, layout=layout, scale=scale, **kwargs)
        this.call = Call(this.first_head, *inputs, layout, scale, q_clusters, k_clusters, selected, out.clone(), logsumexp)
        calls.append(this.call)
        return out, logsumexp

    def watched_far(q, k, v, out, logsumexp, q_clusters, k_clusters, moments, *args, **kwargs):
        share = far(q, k, v, out, logsumexp, q_clusters, k_clusters, moments, *args, **kwargs)
        this.call.moments, this.call.share, this.call.out = moments, share, out.clone()
        return share

    cluster, near, far = algorithm.cluster, algorithm.near_field, algorithm.far_field
    monkeypatch.setattr(algorithm, "cluster", watched_cluster)
    monkeypatch.setattr(algorithm, "near_field", watched_near)
    monkeypatch.setattr(algorithm, "far_field", watched_far)
    return calls


def labels(clusters) -> torch.Tensor:
    """Which cluster each token is in `[B, H, N]`, from the order and the offsets."""
    b, h, n = clusters.order.shape
    out = torch.full((b, h, n), -1, dtype=torch.long)
    for i in range(b):
        for j in range(h):
            sizes = clusters.offsets[i, j].long().diff()
            out[i, j, clusters.order[i, j].long()] = torch.repeat_interleave(sizes)
    assert (out >= 0).all()
    return out
