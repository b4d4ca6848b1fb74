"""Which backend takes a call, and what is said where none does."""

import pytest
import torch
from svg2_pack.svg2_core.ops import registry
from svg2_pack.svg2_core.reasons import Reason


def call(dtype=torch.float32):
    return registry.Call(torch.device("cpu"), dtype, 64)


@pytest.fixture(autouse=True)
def reinstated():
    yield
    for name in registry.NAMES:
        registry.reinstate(name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("requested, taken", [("auto", "sdpa"), ("sdpa", "sdpa"), ("torch", "torch")])
def test_torch_takes_floats_on_a_cpu(requested, taken, dtype):
    assert registry.choose(requested, call(dtype)) == taken


def test_the_definition_serves_where_its_fast_form_does_not():
    assert registry.choose("auto", call(torch.float64)) == "torch"
    registry.retire("sdpa", RuntimeError("a wrong result"))
    assert registry.choose("auto", call()) == "torch"


def test_sdpa_by_name_is_tested_first(monkeypatch):
    """A wrong result of one of its operations, whatever the device, and it serves nothing."""
    from svg2_pack.svg2_core.ops.moments import sdpa

    right = sdpa.moments
    monkeypatch.setattr(sdpa, "moments", lambda *args: [x * 1.1 for x in right(*args)])
    refusal = registry.choose("sdpa", call())
    assert refusal.reason is Reason.KERNEL_FAILED and "moments: values" in refusal.detail


def test_a_dtype_nobody_takes():
    refusal = registry.choose("auto", call(torch.float8_e4m3fn))
    assert refusal.reason is Reason.UNSUPPORTED_DTYPE and "float8" in refusal.detail


def test_a_device_torchs_reference_cannot_serve():
    """Apple's has no fp64: refused before the call, not failed in it."""
    refusal = registry.choose("auto", registry.Call(torch.device("mps"), torch.float32, 64))
    assert isinstance(refusal, registry.Refusal) and refusal.reason is Reason.UNSUPPORTED_DEVICE


@pytest.fixture
def gpu(monkeypatch):
    """As on an NVIDIA GPU, where Triton and the prebuilt kernels are as `missing` says."""
    missing = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "_triton_missing", lambda: missing.get("triton"))
    monkeypatch.setattr(registry, "_prebuilt_missing", lambda source, device: missing.get("cuda"))
    monkeypatch.setattr(registry, "_self_test", lambda name, call: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return missing


def on_gpu(head_dim=128, dtype=torch.bfloat16):
    return registry.Call(torch.device("cuda", 0), dtype, head_dim)


def test_the_order_on_a_gpu_is_the_tables(gpu, monkeypatch):
    from svg2_pack.svg2_core.ops import preference

    monkeypatch.setattr(preference, "MEASURED", {9: (("triton", "cuda"), "a record")})
    assert registry.choose("auto", on_gpu()) == "triton"
    monkeypatch.setattr(preference, "MEASURED", {})
    assert registry.choose("auto", on_gpu()) == "cuda"


def test_the_next_backend_takes_over(gpu):
    assert registry.choose("cuda", on_gpu()) == "cuda"
    assert registry.choose("auto", on_gpu(head_dim=96)) == "triton"
    refusal = registry.choose("cuda", on_gpu(head_dim=96))
    assert refusal.reason is Reason.UNSUPPORTED_HEAD_DIM and "64 nor 128" in refusal.detail
    registry.retire("triton", RuntimeError("broken"))
    assert registry.choose("auto", on_gpu()) == "cuda"
    gpu["cuda"] = "the driver is too old"
    refusal = registry.choose("cuda", on_gpu())
    assert refusal.reason is Reason.NO_BACKEND and "the driver is too old" in refusal.detail
    assert registry.choose("auto", on_gpu()).reason is Reason.KERNEL_FAILED, "never plain torch on a GPU"


def test_without_triton_neither_kernel_runs(gpu):
    """The prebuilt kernels are the attention; clusters and maps are Triton's."""
    gpu["triton"] = "not installed (pip install triton)"
    for name in ("auto", "triton", "cuda"):
        refusal = registry.choose(name, on_gpu())
        assert refusal.reason is Reason.NO_BACKEND and "pip install triton" in refusal.detail


def test_names():
    for name in ("auto", "cuda", "triton", "torch"):
        registry.check_name(name)
    with pytest.raises(ValueError, match=r"backend.*'warp'.*triton"):
        registry.check_name("warp")


def test_a_failed_backend_is_retired_with_its_error():
    registry.retire("torch", RuntimeError("no such instruction"))
    registry.retire("torch", RuntimeError("a later error"))
    refusal = registry.choose("torch", call())
    assert refusal.reason is Reason.KERNEL_FAILED
    assert "RuntimeError: no such instruction" in refusal.detail and "later" not in refusal.detail
    registry.reinstate("torch")
    assert registry.choose("torch", call()) == "torch"


def test_reasons_of_the_contract():
    """Their names are in saved reports and in what others read: they do not change."""
    assert {reason.value for reason in Reason} == {
        "not_video_self_attention", "unknown_layout", "no_run", "warmup", "past_end", "dense_block", "short_sequence",
        "unsupported_mask", "unsupported_head_dim", "unsupported_dtype", "unsupported_device", "no_backend",
        "kernel_failed", "out_of_memory", "never_came", "gradients", "recorded", "disabled",
    }  # fmt: skip
    assert len({reason.sentence for reason in Reason}) == len(Reason)
