"""The Triton kernels in the real host: natively on a GPU, in Triton's interpreter without one.

All other tests of this folder run with them too; in the interpreter that takes more than an hour:
`SVG2_BACKEND=triton python scripts/test.py tests/nodes`.
"""

from dataclasses import replace

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.metrics import rel_l2
from tiny_wan import latent, random_wan, sample

pytest.importorskip("triton", reason="Triton has no build for this system")

SMALL = (2, 12, 12)  # 72 tokens: the interpreter is slow
FEW = {"q_clusters": 4, "k_clusters": 7, "kmeans_init_iters": 2, "kmeans_iters": 1, "warmup_steps": 0, "dense_blocks": ""}


@pytest.fixture(scope="module")
def wan(host):
    """Of one block: what more of them do is no matter of the backend."""
    return random_wan(layers=1)


def check_equals_dense(svg2, model, sample, **inputs):
    """With everything selected, `sample(model)` is the dense sample, and every call of its self-attention ran sparse."""
    dense = sample(model)
    patched, stats = svg2(model, backend="triton", top_p=1.0, **{**FEW, **inputs})
    assert rel_l2(sample(patched), dense) <= 1e-4
    report = stats.latest()
    assert report.sparse_calls > 0 and report.backend == "triton" and report.dense_calls == {}
    return report


def test_equals_dense(wan, svg2):
    """Two videos of a size that the host pads to whole patches."""
    kwargs = {"shape": latent(2, 7, 9, batch=2), "steps": 2}
    report = check_equals_dense(svg2, wan, lambda model: sample(model, **kwargs))
    assert report.sparse_calls == 2 and report.tokens == 2 * 4 * 5


def test_equals_dense_with_padded_text_in_the_sequence(host, svg2):
    variant = next(v for v in tiny_models.VARIANTS if v.name == "hunyuan_video t2v padded")
    small = torch.zeros(1, 16, *SMALL)
    report = check_equals_dense(svg2, variant.build(), lambda model: tiny_models.sample(variant, model, shape=small))
    assert report.sparse_calls == 2 * variant.blocks


def test_equals_the_torch_backend(wan, svg2, monkeypatch):
    from svg2_pack.nodes.patching import knobs

    whole = knobs.preset_config  # what both backends have: clusters of tokens in their own space
    monkeypatch.setattr(knobs, "preset_config", lambda *names: replace(whole(*names), metric_directions=0))
    samples = {}
    for backend in ("torch", "triton"):
        patched, stats = svg2(wan, backend=backend, top_p=0.3, compensation="centroid", **FEW)
        samples[backend] = sample(patched, steps=2, shape=latent(*SMALL))
        assert stats.latest().backend == backend and stats.latest().density < 0.7
    dense = sample(wan, steps=2, shape=latent(*SMALL))
    assert rel_l2(samples["triton"], samples["torch"]) <= 1e-3
    assert rel_l2(samples["torch"], dense) > 1e-2, "sparse must differ from dense for this to mean anything"


def test_first_order_at_auto(wan, svg2):
    """What the preset asks for is what the kernels serve: first order, pairs chosen by density, and an error that they report. Another
    basis of the same directions makes other clusters than plain torch's, which are as good."""
    few = {**FEW, "dense_blocks": "auto", "warmup_steps": -1}
    errors, dense = {}, sample(wan, steps=2, shape=latent(*SMALL))
    for backend in ("torch", "triton"):
        patched, stats = svg2(wan, backend=backend, density=0.1, **few)
        errors[backend] = rel_l2(sample(patched, steps=2, shape=latent(*SMALL)), dense)
        report = stats.latest()
        assert report.sparse_calls == 2 and report.dense_calls == {} and report.backend == backend
        # An interpreted kernel is slower than dense attention, which a notice says; nothing else is to be said.
        assert not [notice for notice in report.notices if "not faster" not in notice]
        assert report.settings["compensation"] == "first_order" and report.settings["density"] == 0.1
        assert 0 < report.error < 1 and 0.03 < report.density <= 0.101
    assert 0 < errors["triton"] <= 1.5 * errors["torch"]


def test_a_kernel_that_fails_in_a_run_is_retired(wan, svg2, monkeypatch):
    """In the middle of a call, when a part of the result is written: that call and the later ones are dense."""
    from svg2_pack.svg2_core.ops import registry
    from svg2_pack.svg2_core.ops.near_field import triton as kernels

    whole, calls = kernels.near_field, []

    def fails_in_the_second_call(q, k, v, out, *args, **kwargs):
        logsumexp = whole(q, k, v, out, *args, **kwargs)
        calls.append(q.shape)
        if len([shape for shape in calls if shape[2] == 72]) == 2:  # the self-test is a call too
            out.fill_(torch.nan)
            raise RuntimeError("an illegal instruction was encountered")
        return logsumexp

    monkeypatch.setattr(kernels, "near_field", fails_in_the_second_call)
    try:
        patched, stats = svg2(wan, backend="triton", top_p=1.0, **FEW)
        dense = sample(wan, steps=3, shape=latent(*SMALL))
        assert rel_l2(sample(patched, steps=3, shape=latent(*SMALL)), dense) <= 1e-4
        assert stats.latest().sparse_calls == 1 and stats.latest().dense_calls == {"kernel_failed": 2}
    finally:
        registry.reinstate("triton")


def test_a_wrong_kernel_is_found_by_the_self_test(wan, svg2, monkeypatch):
    from svg2_pack.svg2_core.ops import registry
    from svg2_pack.svg2_core.ops.near_field import triton as kernels

    whole = kernels.near_field

    def slightly_wrong(q, *args, scale, **kwargs):
        return whole(q, *args, scale=1.2 * scale, **kwargs)

    monkeypatch.setattr(kernels, "near_field", slightly_wrong)
    registry.reinstate("triton")
    try:
        dense = sample(wan, steps=2, shape=latent(*SMALL))
        patched, stats = svg2(wan, backend="triton", **FEW)
        assert torch.equal(sample(patched, steps=2, shape=latent(*SMALL)), dense)
        assert stats.latest().dense_calls == {"kernel_failed": 2}
        assert any("near_field: relative error" in notice for notice in stats.latest().notices)
    finally:
        registry.reinstate("triton")
