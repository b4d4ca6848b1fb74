"""What users combine the node with: each equals dense with everything selected, and runs sparse."""

import pytest
import torch
from svg2_pack.svg2_core.metrics import rel_l2
from tiny_wan import conditioning, latent, random_wan, sample

EVERYWHERE = {"top_p": 1.0, "warmup_steps": 0, "dense_blocks": ""}


def test_vace(host, svg2):
    """Its control blocks repeat the index of the block beside them; each has clusters of its own."""
    model = random_wan("VaceWanModel", layers=4, vace_layers=2, vace_in_dim=96)
    cond = conditioning(vace_frames=[torch.randn(1, 32, 5, 16, 16)], vace_mask=[torch.ones(1, 64, 5, 16, 16)], vace_strength=[1.0])
    dense = sample(model, positive=cond, negative=cond)
    patched, stats = svg2(model, **EVERYWHERE)
    assert rel_l2(sample(patched, positive=cond, negative=cond), dense) <= 1e-4
    assert sorted(stats.latest().block_labels) == ["0", "0.1", "1", "2", "2.1", "3"]
    assert stats.latest().sparse_calls == 6 * 4


def test_regional_conditioning(wan, svg2):
    left = conditioning(seed=2)
    left[0][1].update({"area": (5, 8, 16, 0, 8, 0), "strength": 1.0, "set_area_to_bounds": False})
    positive = conditioning(seed=1) + left
    dense = sample(wan, positive=positive, cfg=2.0)
    patched, stats = svg2(wan, **EVERYWHERE)
    assert rel_l2(sample(patched, positive=positive, cfg=2.0), dense) <= 1e-4
    assert stats.latest().dense_calls == {} and stats.latest().sparse_calls > 0


@pytest.mark.parametrize("schedule", ["standard_static", "looped_uniform"])
def test_context_windows(wan, svg2, schedule):
    import comfy.context_windows as windows

    def windowed(model):
        model = model.clone()
        model.model_options["context_handler"] = windows.IndexListContextHandler(
            windows.get_matching_context_schedule(schedule), windows.get_matching_fuse_method("pyramid"),
            context_length=5, context_overlap=2, context_stride=2, closed_loop=True, dim=2)  # fmt: skip
        windows.create_prepare_sampling_wrapper(model)
        return model

    x = latent(12, 8, 8)
    dense = sample(windowed(wan), shape=x)
    patched, stats = svg2(wan, **EVERYWHERE)
    assert rel_l2(sample(windowed(patched), shape=x), dense) <= 1e-4
    assert stats.latest().dense_calls == {} and stats.latest().sparse_calls > 3 * 4


def test_a_wrapper_that_splits_the_batch_unannounced(wan, svg2, monkeypatch):
    """Some nodes cut the host's batch in two inside a model-function wrapper: no row may start from another's centroids."""

    def split(apply_model, call):
        parts = [apply_model(x, t, **{**call["c"], "c_crossattn": c}) for x, t, c in zip(
            call["input"].chunk(2), call["timestep"].chunk(2), call["c"]["c_crossattn"].chunk(2), strict=True)]  # fmt: skip
        return torch.cat(parts)

    from svg2_pack.svg2_core.cache import CentroidCache

    kept = []
    monkeypatch.setattr(CentroidCache, "put", lambda self, key, entry: kept.append(key))
    patched, stats = svg2(wan, **EVERYWHERE)
    halves = patched.clone()
    halves.set_model_unet_function_wrapper(split)
    assert rel_l2(sample(halves, cfg=3.0), sample(wan, cfg=3.0)) <= 1e-4
    assert stats.latest().sparse_calls == 2 * 3 * 4 and kept == []
    sample(patched, cfg=3.0)
    assert len(kept) == 2 * 3 * 4, "the same batch whole is two known rows"
