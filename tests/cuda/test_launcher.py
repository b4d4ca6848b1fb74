"""The launcher in svg2_core on the simulated driver: what it launches, and that its parameters are the kernels' own."""

import ctypes

import pytest
import torch


@pytest.fixture
def launcher():
    from svg2_pack.svg2_core.ops.dynamic_attention import cuda

    return cuda


def test_the_parameters_have_the_size_of_every_compiled_kernels(launcher, manifest):
    sizes = {kernel["parameters"] for entry in manifest.values() for kernel in entry["kernels"].values()}
    assert sizes == {ctypes.sizeof(launcher.Params)}


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0), (13, 0)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_attention_call_through_the_driver(launcher, simulate, monkeypatch, capability, head_dim, dtype):
    """Tensors lie on the CPU, so nothing is computed: addresses, grids and shared memory are looked at."""
    from svg2_pack.cuda import driver
    from svg2_pack.svg2_core import Layout
    from svg2_pack.svg2_core.ops.kmeans import kmeans

    fake = simulate(capability, version=13000)
    fake.parameter_bytes = ctypes.sizeof(launcher.Params)
    monkeypatch.setattr(launcher, "load", lambda device: driver.load(launcher.SOURCE, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: type("Stream", (), {"cuda_stream": 0x70}))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, head_dim, generator=g).to(dtype) for _ in range(3))
    groups = [kmeans(x.float(), count, iterations=1) for x, count in ((q, 3), (k, 7))]
    selected = torch.ones(1, 2, 3, 7, dtype=torch.bool)
    out = torch.zeros_like(q)
    launcher.dynamic_attention(q, k, v, out, *groups, selected, layout=Layout(0, 300), scale=0.25, tail=None)
    kind = launcher.DTYPES[dtype]
    names = [launch["kernel"] for launch in fake.launches]
    assert names[0] == "svg2_plan" and fake.launches[0]["grid"] == (3, 2, 1)
    assert set(names[1:]) == {f"svg2_attention_{kind}_{head_dim}_{rows}" for rows in (64, 128)}
    for launch in fake.launches:
        assert launch["block"] == (128, 1, 1) and launch["stream"] == 0x70 and launch["shared"] <= 101_376
        params = launcher.Params.from_buffer_copy(launch["parameters"])
        assert [params.q, params.k, params.v, params.out] == [x.data_ptr() for x in (q, k, v, out)]
        assert (params.q_b, params.q_h, params.q_n) == q.stride()[:3] and params.heads == 2 and params.c_k == 7
        assert params.scale == pytest.approx(0.25 * 1.4426950408889634)
    assert not fake.faults
