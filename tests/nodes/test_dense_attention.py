"""The input dense_attention: quantised attention for what stays dense, stood in for by exact ones that count their calls."""

import sys
import types

import pytest
import torch
from svg2_pack.svg2_core.metrics import rel_l2
from tiny_wan import sample

SOME_DENSE = {"warmup_steps": 1, "dense_blocks": "0", "top_p": 1.0}  # of 12 calls 6
DENSE_CALLS = {"warmup": 3, "dense_block": 3}
REFUSED = "dense_attention_refused"


@pytest.fixture(autouse=True)
def nothing_has_failed(host):
    from svg2_pack.nodes.patching import dense_attention

    dense_attention.forget()
    yield
    dense_attention.forget()


@pytest.fixture
def sage(monkeypatch):
    """The package sageattention: exact. `calls`: the shapes that came; `error`: what it raises instead."""
    package = types.ModuleType("sageattention")
    package.calls, package.error = [], None

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        package.calls.append((tensor_layout, tuple(q.shape)))
        if package.error is not None:
            raise package.error
        assert tensor_layout in ("HND", "NHD") and not is_causal
        if tensor_layout == "NHD":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=sm_scale)
        return out if tensor_layout == "HND" else out.transpose(1, 2)

    package.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", package)
    return package


@pytest.fixture
def int8(host, monkeypatch):
    """The host's INT8 attention as newer hosts register it: exact. `calls`: whether each had a mask; `error`: what it raises."""
    import comfy.ldm.modules.attention as attention

    kitchen = types.SimpleNamespace(calls=[], error=None)

    @attention.wrap_attn
    def attention_comfy_kitchen_int8(q, k, v, heads, mask=None, **kwargs):
        kitchen.calls.append(mask is not None)
        if kitchen.error is not None:
            raise kitchen.error
        return attention.attention_pytorch(q, k, v, heads, mask=mask, **kwargs)

    monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, "comfy_kitchen_int8", attention_comfy_kitchen_int8)
    return kitchen


@pytest.fixture
def no_sage(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)


@pytest.mark.parametrize("name", ["sage", "int8"])
def test_it_takes_the_dense_calls_over_the_video(wan, dense_sample, svg2, request, name):
    package = request.getfixturevalue(name)
    patched, stats = svg2(wan, **SOME_DENSE, dense_attention=name)
    assert rel_l2(sample(patched), dense_sample) <= 1e-5
    report = stats.latest()
    assert report.dense_calls == DENSE_CALLS and report.sparse_calls == 6 and REFUSED not in report.remarks
    assert len(package.calls) == 6, "no cross-attention, no sparse call"


def test_auto_asks_none_of_them(wan, svg2, sage, int8, monkeypatch):
    import comfy.ldm.modules.attention as attention

    with_them = sample(svg2(wan, **SOME_DENSE)[0])
    monkeypatch.delitem(sys.modules, "sageattention")
    monkeypatch.delitem(attention.REGISTERED_ATTENTION_FUNCTIONS, "comfy_kitchen_int8")
    assert torch.equal(sample(svg2(wan, **SOME_DENSE)[0]), with_them)
    assert sage.calls == [] and int8.calls == []


def test_the_choice_is_for_all_dense_calls_also_of_a_comparison(wan, svg2, sage):
    """A run without a dense call makes one, to tell what sparse attention gains over the choice."""
    patched, stats = svg2(wan, warmup_steps=0, dense_blocks="", dense_attention="sage")
    sample(patched)
    assert stats.latest().dense_calls == {} and len(sage.calls) == 1


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sage_takes_and_returns_what_the_hosts_functions_do(host, sage, skip_reshape, skip_output_reshape, scale):
    from comfy.ldm.modules.attention import attention_pytorch
    from svg2_pack.nodes.patching import dense_attention

    q, k, v = torch.randn(3, *((2, 3, 20, 16) if skip_reshape else (2, 20, 48))).unbind()
    arguments = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape} | ({"scale": scale} if scale else {})
    out = dense_attention.find("sage")(q, k, v, 3, mask=None, attn_precision=None, transformer_options={}, **arguments)
    expected = attention_pytorch(q, k, v, 3, **arguments)
    assert out.shape == expected.shape and rel_l2(out, expected) < 1e-6
    assert sage.calls == [("HND", (2, 3, 20, 16)) if skip_reshape else ("NHD", (2, 20, 3, 16))], "as it lies in memory"


def test_sage_1_does_not_write_into_the_models_keys(host, sage, monkeypatch):
    from svg2_pack.nodes.patching import dense_attention

    def version_1(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
        if smooth_k:
            k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
        return exact(q, k, v, tensor_layout, is_causal, sm_scale)

    exact = sage.sageattn
    monkeypatch.setattr(sage, "sageattn", version_1)
    q, k, v = torch.randn(3, 1, 20, 32).unbind()
    before = k.clone()
    out = dense_attention.find("sage")(q, k, v, 2)
    assert torch.equal(k, before) and rel_l2(out, _exact(q, k, v, 2)) < 1e-6


def _exact(q, k, v, heads):
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(q, k, v, heads)


@pytest.mark.parametrize("name", ["sage", "int8"])
def test_a_call_that_fails_is_answered_as_at_auto_and_a_notice_says_so(wan, dense_sample, svg2, request, caplog, name):
    package = request.getfixturevalue(name)
    package.error = ValueError("Unsupported head_dim: 256\nand more")
    patched, stats = svg2(wan, **SOME_DENSE, dense_attention=name)
    assert torch.equal(sample(patched), sample(svg2(wan, **SOME_DENSE)[0]))
    report = stats.latest()
    assert report.dense_calls == DENSE_CALLS and len(package.calls) == 1, "a call of that kind is not tried again"
    why = "cpu, float32, head dimension 128: ValueError: Unsupported head_dim: 256"
    assert report.remarks[REFUSED].values == {"name": name, "why": why}
    assert f"dense_attention {name} did not take some dense calls ({why}): they ran as at auto" in report.notices
    assert caplog.text.count("did not take some dense calls") == 1


def test_without_memory_it_is_tried_again(wan, svg2, sage):
    sage.error = torch.OutOfMemoryError("CUDA out of memory")
    patched, stats = svg2(wan, **SOME_DENSE, dense_attention="sage")
    sample(patched)
    assert len(sage.calls) == 6 and "out of memory" in stats.latest().remarks[REFUSED].values["why"]


def test_what_failed_on_one_kind_of_call_is_tried_on_others(host, sage):
    from svg2_pack.nodes.patching import dense_attention

    choice, arguments = dense_attention.find("sage"), {"mask": None, "skip_reshape": True, "skip_output_reshape": True}
    q = torch.randn(1, 2, 8, 16)
    sage.error = AssertionError("Input tensors must be in dtype of torch.float16 or torch.bfloat16")
    assert "float32, head dimension 16: AssertionError" in choice.answer(q, q, q, 2, arguments)
    sage.error = None
    assert isinstance(choice.answer(q, q, q, 2, arguments), str)
    assert isinstance(choice.answer(*[q.bfloat16()] * 3, 2, arguments), torch.Tensor)
    dense_attention.forget()
    assert isinstance(choice.answer(q, q, q, 2, arguments), torch.Tensor)


def masked(func, q, k, v, heads, mask=None, **kwargs):
    """Another node's attention, which adds a mask that hides nothing."""
    return func(q, k, v, heads, mask=torch.zeros(1, 1, 1, k.shape[1]), **kwargs)


@pytest.mark.parametrize("name, takes", [("flash", False), ("sage", False), ("int8", True)])
def test_masks_go_to_what_takes_them(wan, dense_sample, svg2, sage, int8, monkeypatch, name, takes):
    import comfy.ldm.modules.attention as attention

    monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, "flash", lambda *args, **kwargs: pytest.fail("it takes none"))
    model = wan.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = masked
    patched, stats = svg2(model, **SOME_DENSE, dense_attention=name)
    assert rel_l2(sample(patched), dense_sample) <= 1e-5
    remarks = stats.latest().remarks
    told = remarks[REFUSED].values if REFUSED in remarks else None
    assert told == (None if takes else {"name": name, "why": "a mask"})
    assert int8.calls == ([True] * 6 if takes else []) and not sage.calls


def test_what_a_model_wants_in_full_precision(host, sage):
    from svg2_pack.nodes.patching import dense_attention

    told, exact = [], []
    attention = dense_attention.find("sage").or_else(lambda *args, **kwargs: exact.append(kwargs) or args[0], told.append)
    q = torch.randn(1, 8, 32)
    attention(q, q, q, 2, low_precision_attention=False, new_in_the_host=1)
    assert told == ["the model asks for full precision"] and sage.calls == []
    assert exact[0]["low_precision_attention"] is False and exact[0]["new_in_the_host"] == 1
    attention(q, q, q, 2, low_precision_attention=True)
    assert len(sage.calls) == 1 and len(exact) == 1


def test_a_name_that_is_not_here_is_an_error_that_says_what_is(wan, svg2, no_sage, int8):
    with pytest.raises(ValueError, match=r"^dense_attention: 'sage' is not accepted; it takes auto or flash or int8 on this machine \(the package sageattention is not installed\)"):
        svg2(wan, dense_attention="sage")
    with pytest.raises(ValueError, match=r"^dense_attention: 'xformers' is not accepted; it takes auto or flash or int8 on this machine$"):
        svg2(wan, dense_attention="xformers")


def test_why_it_is_not_here(host, monkeypatch):
    """No package, one that lacks another, one for another torch; a host without INT8, or on a machine without."""
    import importlib

    import comfy.ldm.modules.attention as attention
    from svg2_pack.nodes.patching import dense_attention

    def imports(error):
        def fail(name):
            raise error

        monkeypatch.setattr(importlib, "import_module", fail)
        return dense_attention.find("sage").detail

    assert imports(ModuleNotFoundError("No module named 'sageattention'", name="sageattention")) == "the package sageattention is not installed"
    assert imports(ModuleNotFoundError("No module named 'triton'", name="triton")) == "the package sageattention needs triton, which is not installed"
    assert "cannot be loaded (ImportError: undefined symbol" in imports(ImportError("undefined symbol: _ZN3c10"))
    monkeypatch.delitem(attention.REGISTERED_ATTENTION_FUNCTIONS, "comfy_kitchen_int8", raising=False)
    monkeypatch.delattr(attention, "COMFY_KITCHEN_INT8_ATTENTION_IS_AVAILABLE", raising=False)
    assert "this ComfyUI has no INT8 attention" in dense_attention.find("int8").detail
    monkeypatch.setattr(attention, "COMFY_KITCHEN_INT8_ATTENTION_IS_AVAILABLE", False, raising=False)
    assert "comfy-kitchen has no INT8 attention for this machine" in dense_attention.find("int8").detail


def test_the_options_are_the_same_on_every_machine(host):
    """A shared workflow's value is checked against them before the node is asked."""
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    (item,) = (i for i in SVG2SparseAttention.GET_SCHEMA().inputs if i.id == "dense_attention")
    assert item.options == ["auto", "flash", "sage", "int8"] and item.default == "auto"


def test_a_disabled_node_asks_for_nothing(wan, svg2, no_sage):
    assert svg2(wan, enabled=False, dense_attention="sage")[0] is wan


def test_the_doctor_tells_which_are_here(host, sage, int8, monkeypatch):
    import comfy.ldm.modules.attention as attention
    from svg2_pack.nodes.doctor import dense_lines

    monkeypatch.delitem(attention.REGISTERED_ATTENTION_FUNCTIONS, "flash", raising=False)
    cpu = torch.device("cpu")
    ready = "ready (relative error 0.0000 on random numbers; 0 is exact)"
    assert dense_lines(cpu) == [
        "dense_attention flash: not ready: the package flash-attn is not installed",
        f"dense_attention sage: {ready}",
        f"dense_attention int8: {ready}",
    ]
    sage.error = TypeError("list indices must be integers or slices, not NoneType")
    int8.error = torch.OutOfMemoryError("CUDA out of memory")
    _, one, other = dense_lines(cpu)
    assert one == "dense_attention sage: not ready: cpu, float32, head dimension 128: TypeError: list indices must be integers or slices, not NoneType"
    assert other.startswith("dense_attention int8: not ready: ") and "out of memory" in other
    sage.error = None
    assert dense_lines(cpu)[1] == f"dense_attention sage: {ready}", "tried again"
    monkeypatch.setattr(sage, "sageattn", lambda q, k, v, **_: torch.full_like(q, torch.nan))
    assert "not ready: wrong result (relative error nan" in dense_lines(cpu)[1]
    monkeypatch.setitem(sys.modules, "sageattention", None)
    assert dense_lines(cpu)[1] == "dense_attention sage: not ready: the package sageattention is not installed"
