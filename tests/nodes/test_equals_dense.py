"""The law that catches most mistakes: top_p = 1 selects everything, so the sample equals the dense sample."""

import pytest
import torch
from svg2_pack.svg2_core.metrics import rel_l2
from tiny_wan import conditioning, latent, random_wan, sample

# All calls sparse: no warm-up, no dense block.
EVERYWHERE = {"top_p": 1.0, "warmup_steps": 0, "dense_blocks": ""}


@pytest.mark.parametrize("compensation", ["off", "centroid"])
def test_text_to_video(wan, svg2, dense_sample, compensation):
    patched, stats = svg2(wan, compensation=compensation, **EVERYWHERE)
    assert rel_l2(sample(patched), dense_sample) <= 1e-4
    report = stats.latest()
    assert report.sparse_calls == 3 * 4 and report.density == 1 and report.dense_calls == {}


def test_image_to_video(host, svg2):
    model = random_wan(in_dim=36)
    cond = conditioning(concat_latent_image=torch.randn(1, 16, 5, 16, 16), concat_mask=torch.ones(1, 1, 5, 16, 16))
    dense = sample(model, positive=cond, negative=cond)
    assert rel_l2(dense, sample(model)) > 1e-2, "the image must matter"
    patched, stats = svg2(model, **EVERYWHERE)
    assert rel_l2(sample(patched, positive=cond, negative=cond), dense) <= 1e-4
    assert stats.latest().sparse_calls == 3 * 4


@pytest.mark.parametrize("shape", [(3, 18, 22), (1, 30, 34), (7, 10, 14)], ids=str)
def test_any_resolution(wan, svg2, shape):
    x = latent(*shape)
    dense = sample(wan, shape=x)
    patched, stats = svg2(wan, **EVERYWHERE)
    assert rel_l2(sample(patched, shape=x), dense) <= 1e-4
    assert stats.latest().tokens == shape[0] * shape[1] // 2 * shape[2] // 2


def test_odd_latent_is_padded_like_the_host_does(wan, svg2):
    x = latent(3, 15, 17)
    dense = sample(wan, shape=x)
    patched, stats = svg2(wan, **EVERYWHERE)
    assert rel_l2(sample(patched, shape=x), dense) <= 1e-4
    assert stats.latest().tokens == 3 * 8 * 9


def test_batch_of_videos(wan, svg2):
    x = latent(batch=2)
    dense = sample(wan, shape=x, cfg=3.0)
    patched, stats = svg2(wan, **EVERYWHERE)
    assert rel_l2(sample(patched, shape=x, cfg=3.0), dense) <= 1e-4
    assert stats.latest().sparse_calls > 0
