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
@pytest.mark.parametrize("requested", ["auto", "torch"])
def test_torch_takes_floats_on_a_cpu(requested, dtype):
    assert registry.choose(requested, call(dtype)) == "torch"


def test_a_dtype_nobody_takes():
    refusal = registry.choose("auto", call(torch.float8_e4m3fn))
    assert refusal.reason is Reason.UNSUPPORTED_DTYPE and "float8" in refusal.detail


def test_a_device_torchs_reference_cannot_serve():
    """Apple's has no fp64: refused before the call, not failed in it."""
    refusal = registry.choose("auto", registry.Call(torch.device("mps"), torch.float32, 64))
    assert isinstance(refusal, registry.Refusal) and refusal.reason is Reason.UNSUPPORTED_DEVICE


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
        "kernel_failed", "out_of_memory", "disabled",
    }  # fmt: skip
    assert len({reason.sentence for reason in Reason}) == len(Reason)
