"""The Triton kernels in the real host: natively on a GPU, in Triton's interpreter without one."""

import pytest
import torch
from svg2_pack.svg2_core.metrics import rel_l2
from tiny_wan import latent, sample

pytest.importorskip("triton", reason="Triton has no build for this system")

SMALL = (2, 12, 12)  # 72 tokens: the interpreter is slow
FEW = {"q_clusters": 4, "k_clusters": 7, "kmeans_init_iters": 2, "kmeans_iters": 1, "warmup_steps": 0, "dense_blocks": ""}


def test_equals_dense_with_everything_selected(wan, svg2):
    dense = sample(wan, steps=2, shape=latent(*SMALL))
    patched, stats = svg2(wan, backend="triton", top_p=1.0, **FEW)
    assert rel_l2(sample(patched, steps=2, shape=latent(*SMALL)), dense) <= 1e-4
    report = stats.latest()
    assert report.sparse_calls == 6 and report.backend == "triton" and report.dense_calls == {}


@pytest.mark.parametrize("compensation", ["off", "centroid"])
def test_equals_the_torch_backend(wan, svg2, compensation):
    samples = {}
    for backend in ("torch", "triton"):
        patched, stats = svg2(wan, backend=backend, top_p=0.3, compensation=compensation, **FEW)
        samples[backend] = sample(patched, steps=2, cfg=3.0, shape=latent(*SMALL))
        assert stats.latest().backend == backend and stats.latest().density < 0.7
    dense = sample(wan, steps=2, cfg=3.0, shape=latent(*SMALL))
    assert rel_l2(samples["triton"], samples["torch"]) <= 1e-3
    assert rel_l2(samples["torch"], dense) > 1e-2, "sparse must differ from dense for this to mean anything"


def test_a_wrong_kernel_is_found_by_the_self_test(wan, svg2, monkeypatch):
    from svg2_pack.svg2_core.ops import registry
    from svg2_pack.svg2_core.ops.dynamic_attention import triton as kernels

    whole = kernels.dynamic_attention

    def slightly_wrong(q, *args, scale, **kwargs):
        whole(q, *args, scale=1.2 * scale, **kwargs)

    monkeypatch.setattr(kernels, "dynamic_attention", slightly_wrong)
    registry.reinstate("triton")
    try:
        dense = sample(wan, steps=2, shape=latent(*SMALL))
        patched, stats = svg2(wan, backend="triton", **FEW)
        assert torch.equal(sample(patched, steps=2, shape=latent(*SMALL)), dense)
        assert stats.latest().dense_calls == {"kernel_failed": 6}
        assert any("dynamic_attention: relative error" in notice for notice in stats.latest().notices)
    finally:
        registry.reinstate("triton")
