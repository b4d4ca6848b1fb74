"""What SVG2 cannot do well runs dense through the host's attention, and says so."""

import logging

import pytest
import torch
from shortage import short_of_memory
from svg2_pack.svg2_core.metrics import rel_l2
from svg2_pack.svg2_core.ops import registry
from tiny_wan import conditioning, sample


@pytest.fixture(autouse=True)
def all_backends_in_service():
    yield
    for name in registry.NAMES:
        registry.reinstate(name)


def test_short_sequences_stay_dense(wan, svg2, dense_sample, caplog):
    patched, stats = svg2(wan, min_tokens=-1)  # auto: 8,192
    with caplog.at_level(logging.INFO, logger="svg2"):
        assert torch.equal(sample(patched), dense_sample)
    report = stats.latest()
    assert report.sparse_calls == 0 and report.dense_calls == {"short_sequence": 12}
    assert any("320 < 8,192" in notice for notice in report.notices)
    assert sum("shorter than min_tokens" in r.message for r in caplog.records) == 1, "one line per reason and run"


def test_more_clusters_than_tokens_stay_dense(wan, svg2, dense_sample):
    patched, stats = svg2(wan, k_clusters=321)
    assert torch.equal(sample(patched), dense_sample)
    assert set(stats.latest().dense_calls) == {"short_sequence"}


def test_cross_attention_is_no_candidate(wan, svg2):
    patched, stats = svg2(wan, warmup_steps=0, dense_blocks="")
    sample(patched)
    assert stats.latest().dense_calls == {} and stats.latest().sparse_share == 1


@pytest.mark.parametrize("spec, dense", [("0", [0]), ("1-2", [1, 2]), ("-1", [2]), ("0,-1", [0, 2]), ("", [])])
def test_dense_blocks(wan, svg2, spec, dense):
    patched, stats = svg2(wan, dense_blocks=spec, warmup_steps=0)
    sample(patched)
    report = stats.latest()
    rows = dict(zip(report.block_labels, report.density_by_block_and_step, strict=True))
    assert [int(label) for label, row in rows.items() if row == [None] * 4] == dense


def test_disabled_passes_the_very_model_through(wan, svg2):
    patched, stats = svg2(wan, enabled=False)
    assert patched is wan and stats.latest() is None


def other_model(name: str, unet_config: dict):
    """A ModelPatcher of one of the host's image models with random weights."""
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, name)(unet_config)
    config.unet_config["dtype"] = torch.float32
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = config.get_model({})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


SD15 = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1],
        "context_dim": 64, "num_heads": 2, "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False, "adm_in_channels": None}  # fmt: skip
# Latents with a frame axis, and a patch size that is one number: not what a video model's look like.
QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 1, "num_attention_heads": 2,
        "attention_head_dim": 128, "joint_attention_dim": 64}  # fmt: skip


@pytest.mark.parametrize("name, config, shape", [("SD15", SD15, (1, 4, 16, 16)), ("QwenImage", QWEN, (1, 16, 1, 16, 16))])
def test_an_image_model_runs_dense(host, svg2, name, config, shape):
    patcher = other_model(name, dict(config))
    cond, x = [[torch.randn(1, 5, 64), {}]], torch.zeros(shape)
    dense = sample(patcher, steps=2, shape=x, positive=cond, negative=cond)
    patched, stats = svg2(patcher)
    assert torch.equal(sample(patched, steps=2, shape=x, positive=cond, negative=cond), dense)
    report = stats.latest()
    assert report.sparse_calls == 0 and set(report.dense_calls) == {"unknown_layout"}
    assert any("token layout is not known" in notice for notice in report.notices)


def test_a_failing_kernel_is_retired_and_the_call_answered(wan, svg2, dense_sample, monkeypatch):
    """The first call tries each backend of this device once, then is dense as the others are."""
    from svg2_pack.svg2_core import session

    calls = []

    def broken(*args, backend, **kwargs):
        calls.append(backend)
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(session, "svg2_attention", broken)
    patched, stats = svg2(wan)
    assert torch.equal(sample(patched), dense_sample)
    report = stats.latest()
    assert calls == ["sdpa", "torch"], "a retired backend is not tried again"
    assert report.dense_calls == {"kernel_failed": 12}
    assert any("no kernel image is available" in notice for notice in report.notices)


def test_out_of_memory_is_retried_with_fewer_heads(wan, svg2, monkeypatch, two_threads):
    from svg2_pack.svg2_core import session

    small, seen = short_of_memory(session.svg2_attention, heads=1)
    expected = sample(svg2(wan)[0])
    monkeypatch.setattr(session, "svg2_attention", small)
    patched, stats = svg2(wan)
    assert torch.equal(sample(patched), expected)
    assert seen == [None] + [1] * 12, "the rest of the run stays small"
    assert "out_of_memory" not in stats.latest().dense_calls
    sample(patched)
    assert seen[13] is None, "forgotten at the end of the run"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_with_one_head_is_dense(wan, svg2, dense_sample, monkeypatch, error):
    from svg2_pack.svg2_core import session

    def never(*args, **kwargs):
        raise error

    monkeypatch.setattr(session, "svg2_attention", never)
    patched, stats = svg2(wan)
    assert torch.equal(sample(patched), dense_sample)
    assert stats.latest().dense_calls["out_of_memory"] == 12
    assert isinstance(registry.choose("auto", registry.Call(torch.device("cpu"), torch.float32, 128)), str), "not retired"


def test_a_backend_that_is_not_there(wan, svg2, dense_sample):
    patched, stats = svg2(wan, backend="cuda")
    assert torch.equal(sample(patched), dense_sample)
    assert stats.latest().dense_calls["unsupported_device"] == 12
    assert any("needs an NVIDIA GPU" in notice for notice in stats.latest().notices)


def test_sparse_really_differs_from_dense(wan, svg2, dense_sample):
    """Guards the tests above: where nothing forbids it, the sample is sparse, and close."""
    patched, stats = svg2(wan)
    assert 1e-4 < rel_l2(sample(patched), dense_sample) < 0.3
    assert stats.latest().density < 0.5


def test_context_as_long_as_the_video_cannot_be_told_apart(wan, svg2):
    cond = conditioning(tokens=320)
    dense = sample(wan, positive=cond, negative=cond)
    patched, stats = svg2(wan, top_p=0.1)
    assert torch.equal(sample(patched, positive=cond, negative=cond), dense)
    assert set(stats.latest().dense_calls) == {"unknown_layout"}
