"""The launchers in svg2_core on the simulated driver: what it launches, and that its parameters are the kernels' own."""

import ctypes

import pytest
import torch


@pytest.fixture
def launcher():
    from svg2_pack.svg2_core.ops.near_field.cuda import LAUNCHERS

    return LAUNCHERS["cuda"]


@pytest.fixture
def launcher_fa3():
    from svg2_pack.svg2_core.ops.near_field.cuda import LAUNCHERS

    return LAUNCHERS["cuda_fa3"]


def test_the_parameters_have_the_size_of_every_compiled_kernels(launcher, launcher_fa3, manifest):
    from svg2_pack.svg2_core.ops.near_field.packing import Params

    for module in (launcher, launcher_fa3):
        files = [entry for entry in manifest.values() if entry["name"] == module.source]
        sizes = {kernel["parameters"] for entry in files for kernel in entry["kernels"].values()}
        assert files and sizes == {ctypes.sizeof(Params)}


def attend(launcher, fake, monkeypatch, driver, head_dim, dtype):
    """One call of 300 tokens, 2 heads, 3 query and 7 key clusters; q, k, v and what it writes to."""
    from svg2_pack.svg2_core import Layout
    from svg2_pack.svg2_core.ops.kmeans import kmeans
    from svg2_pack.svg2_core.ops.near_field.packing import Params

    fake.parameter_bytes = ctypes.sizeof(Params)
    monkeypatch.setattr(launcher, "load", lambda device: driver.load(launcher.source, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: type("Stream", (), {"cuda_stream": 0x70}))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, head_dim, generator=g).to(dtype) for _ in range(3))
    groups = [kmeans(x.float(), count, iterations=1) for x, count in ((q, 3), (k, 7))]
    selected = torch.ones(1, 2, 3, 7, dtype=torch.bool)
    out = torch.zeros_like(q)
    logsumexp = launcher.near_field(q, k, v, out, *groups, selected, layout=Layout(0, 300), scale=0.25)
    return q, k, v, out, logsumexp


def check(params, q, k, v, out, logsumexp):
    assert [params.q, params.k, params.v, params.out, params.logsumexp] == [x.data_ptr() for x in (q, k, v, out, logsumexp)]
    assert (params.q_b, params.q_h, params.q_n) == q.stride()[:3] and (params.rows, params.heads, params.c_q) == (2, 2, 3)
    assert params.keys and params.granule_lists and params.granule_counts and params.tiles and params.tile_counts and not params.text_bias
    assert params.granules == 300 // 16 + 7 and params.scale == pytest.approx(0.25 * 1.4426950408889634)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0), (13, 0)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_attention_call_through_the_driver(launcher, simulate, monkeypatch, capability, head_dim, dtype):
    """Tensors lie on the CPU, so nothing is computed: addresses, grids and shared memory are looked at."""
    from svg2_pack.cuda import driver
    from svg2_pack.svg2_core.ops.near_field.packing import DTYPES, Params

    fake = simulate(capability, version=13000)
    tensors = attend(launcher, fake, monkeypatch, driver, head_dim, dtype)
    kind = DTYPES[dtype]
    # As many as there can be: high query tiles have more than 64 rows, and a cluster has one low one at most.
    grids = {launch["kernel"]: launch["grid"] for launch in fake.launches}
    assert grids == {f"svg2_near_field_{kind}_{head_dim}_{rows}": (most, 2, 1) for rows, most in ((128, 300 // 65), (64, 3))}
    for launch in fake.launches:
        assert launch["block"] == (128, 1, 1) and launch["stream"] == 0x70 and launch["shared"] <= 101_376
        params = Params.from_buffer_copy(launch["parameters"])
        check(params, *tensors)
    assert not fake.faults


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_attention_call_on_hopper(launcher_fa3, simulate, monkeypatch, head_dim, dtype):
    from svg2_pack.cuda import driver
    from svg2_pack.svg2_core.ops.near_field.packing import DTYPES, Params

    fake = simulate((9, 0), version=12080, optin=227 * 1024)
    monkeypatch.setattr("svg2_pack.svg2_core.ops.near_field.cuda.persistent_programs", lambda device: 132)
    tensors = attend(launcher_fa3, fake, monkeypatch, driver, head_dim, dtype)
    (launch,) = fake.launches
    assert launch["kernel"] == f"svg2_near_field_{DTYPES[dtype]}_{head_dim}"
    assert launch["grid"] == (2 * (300 // 65 + 3), 1, 1) and launch["block"] == (384, 1, 1)  # query tiles of both heads
    params = Params.from_buffer_copy(launch["parameters"])
    check(params, *tensors)
    assert params.next_tile and params.tile_stride == 300 // 65
    assert not fake.faults


def test_hopper_kernels_serve_only_who_asks_for_them(monkeypatch, simulate):
    """Nothing of them has been measured: no order that "auto" may take has them."""
    from svg2_pack.svg2_core.ops import preference, registry
    from svg2_pack.svg2_core.ops.implementations import implementation
    from svg2_pack.svg2_core.reasons import Reason, Refusal

    # Before the interpreter is switched off for the registry: kernels are interpreted, or not, from their import on.
    for package in ("kmeans", "select"):
        module = implementation(f"svg2_pack.svg2_core.ops.{package}", "cuda_fa3")
        assert module.__name__.endswith(f"{package}.triton")

    monkeypatch.setattr(registry, "_self_test", lambda name, call: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("SVG2_BACKEND", raising=False)
    call = registry.Call(torch.device("cuda", 0), torch.bfloat16, 128)
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        simulate(capability, version=13000)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert "cuda_fa3" not in preference.order_for(call.device) and registry.choose("auto", call) == "cuda"
        answer = registry.choose("cuda_fa3", call)
        if capability == (9, 0):
            assert answer == "cuda_fa3"
        else:
            assert isinstance(answer, Refusal) and answer.reason is Reason.UNSUPPORTED_DEVICE and "Hopper" in answer.detail
    assert "cuda_fa3" in registry.NAMES
    cpu = registry.choose("cuda_fa3", registry.Call(torch.device("cpu"), torch.bfloat16, 128))
    assert cpu.reason is Reason.UNSUPPORTED_DEVICE
