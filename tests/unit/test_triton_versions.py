"""Which Triton may compile for which GPU: a wrong one is refused before a kernel exists, with a sentence that says what to do."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from svg2_pack.cuda import triton_advice
from svg2_pack.svg2_core.ops import registry
from svg2_pack.svg2_core.ops.norm_rope import support
from svg2_pack.svg2_core.ops.triton_versions import LEAST, too_old
from svg2_pack.svg2_core.reasons import Reason

ROOT = Path(__file__).resolve().parents[2]
INSTALLATION = (ROOT / "web/docs/installation.md").read_text(encoding="utf-8")
GPU = torch.device("cuda", 0)
BEFORE = {(3, 2, 0): "3.1.0", (3, 3, 0): "3.2.0", (3, 5, 1): "3.5.0", (3, 3, 1): "3.3.0"}  # the release before each limit


def text(version) -> str:
    return ".".join(map(str, version))


@pytest.mark.parametrize("capability, least", LEAST.items(), ids=lambda value: text(value))
def test_both_sides_of_each_limit(capability, least):
    assert too_old(BEFORE[least], capability) == least
    assert too_old(text(least), capability) is None and too_old("3.8.0", capability) is None and too_old("4.0", capability) is None


@pytest.mark.parametrize(
    ("capability", "like"),
    [((8, 6), (8, 0)), ((8, 9), (8, 0)), ((9, 0), (8, 0)), ((11, 0), (10, 3)), ((12, 1), (12, 0)), ((13, 0), (12, 0))],
    ids=text,
)
def test_a_gpu_between_the_lines(capability, like):
    for version in (*BEFORE.values(), *map(text, LEAST.values())):
        assert too_old(version, capability) == too_old(version, like)


@pytest.mark.parametrize("version", ["3.3.1", "3.3.1+git0b5c1ae3", "3.3.1.post21", "3.4.0a0.post3", "3.10", "3.10.0+fb"])
def test_new_enough_however_it_is_written(version):
    assert too_old(version, (12, 0)) is None


@pytest.mark.parametrize("version", ["3.2.0.post11", "3.2.0+git4ce833eb", "3.3", "3.3.0+git96316ce5", "3.3.0a0.post17", "2.10.9"])
def test_too_old_however_it_is_written(version):
    assert too_old(version, (12, 0)) == (3, 3, 1)


@pytest.mark.parametrize("version", ["", "unknown", "git-1a2b3c"])
def test_a_version_that_says_nothing_is_left_to_the_self_test(version):
    assert too_old(version, (12, 0)) is None


@pytest.fixture
def machine(monkeypatch):
    """machine(Triton, GPU, torch): as there, where no kernel may be compiled."""

    def nothing_may_run(name, call):
        pytest.fail(f"the self-test of {name} would compile kernels")

    def make(triton: str, capability: tuple[int, int], torch_version: str, windows: bool = False, self_test=nothing_may_run):
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
        monkeypatch.setattr(torch, "__version__", torch_version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(registry, "_triton_missing", lambda: None)
        monkeypatch.setattr(registry, "_prebuilt_missing", lambda source, device: None)
        monkeypatch.setattr(registry, "_self_test", self_test)
        known = triton_advice.how_to_get
        monkeypatch.setattr(triton_advice, "how_to_get", lambda *args: known(*args, windows=windows))
        for name in ("TRITON_INTERPRET", "SVG2_BACKEND"):
            monkeypatch.delenv(name, raising=False)
        return registry.Call(GPU, torch.bfloat16, 128)

    yield make
    for name in registry.NAMES:
        registry.reinstate(name)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("capability, least", LEAST.items(), ids=lambda value: text(value))
def test_refused_before_a_kernel_is_compiled(machine, capability, least, windows):
    call = machine(BEFORE[least], capability, "2.9.1+cu128", windows)
    for name in ("auto", "triton", "cuda"):
        refusal = registry.choose(name, call)
        assert refusal.reason is Reason.NO_BACKEND
        assert BEFORE[least] in refusal.detail and f"capability {text(capability)}," in refusal.detail and f"needs {text(least)} or newer" in refusal.detail
        assert ('pip install "triton-windows>=3.5' if windows else "pip install torch") in refusal.detail
    assert support.choose("auto", GPU, torch.bfloat16) == (None, registry.triton_refusal(GPU).detail)


def test_taken_where_it_will_do(machine):
    call = machine("3.3.1", (12, 0), "2.7.1+cu128", self_test=lambda name, call: None)
    assert registry.triton_refusal(GPU) is None and registry.choose("triton", call) == "triton"


def test_without_a_gpu_no_version_matters(machine, monkeypatch):
    machine("3.1.0", (12, 0), "2.5.1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert registry.triton_refusal(torch.device("cpu")) is None


def test_the_doctor_says_it(host, machine):
    from svg2_pack.nodes.doctor import backend_lines

    machine("3.2.0", (12, 0), "2.7.1+cu128", windows=True, self_test=lambda name, call: None)
    sentence = (
        "version 3.2.0 is too old for a GPU of compute capability 12.0, which needs 3.3.1 or newer "
        '(pip install "triton-windows>=3.3.1,<3.4")'
    )
    lines = backend_lines(GPU)
    assert f"backend triton: not ready: {sentence}" in lines
    assert f"backend cuda: not ready: cuda needs triton: {sentence}" in lines
    assert f"auto takes: dense attention (triton: {sentence})" in lines


@pytest.mark.parametrize(
    ("there", "least", "windows", "linux"),
    [
        ("2.6.0+cu124", (0,), 'pip install "triton-windows>=3.2,<3.3"', "pip install torch, which brings its Triton"),
        ("2.7.0", (3, 2, 0), 'pip install "triton-windows>=3.3,<3.4"', "pip install torch, which brings its Triton"),
        ("2.7.1+cu128", (3, 3, 0), 'pip install "triton-windows>=3.3,<3.4"', "pip install torch, which brings its Triton"),
        ("2.7.1+cu128", (3, 3, 1), 'pip install "triton-windows>=3.3.1,<3.4"', "pip install torch, which brings its Triton"),
        ("2.10.0.dev20251024+cu130", (3, 5, 1), 'pip install "triton-windows>=3.6,<3.7"', "pip install torch, which brings its Triton"),
        ("2.6.0+cu126", (3, 3, 1), "update torch, then run SVG2 Doctor", "update torch, which brings its Triton"),
        ("2.5.1", (0,), "update torch, then run SVG2 Doctor", "update torch, which brings its Triton"),
        ("2.99.0", (0,), "install the triton-windows that was made for torch 2.99.0", "pip install torch, which brings its Triton"),
        (None, (0,), "update torch, then run SVG2 Doctor", "update torch, which brings its Triton"),
    ],
)
def test_what_to_do(there, least, windows, linux):
    assert triton_advice.how_to_get(there, least, windows=True).startswith(windows)
    assert triton_advice.how_to_get(there, least, windows=False) == linux


PINNED = [(pair, least) for pair in sorted(set(triton_advice.PAIRS.values())) for least in LEAST.values() if least[:2] <= pair]


@pytest.mark.parametrize("pair, least", PINNED, ids=text)
def test_pins_are_requirements(pair, least):
    from packaging.requirements import Requirement

    pin = Requirement(triton_advice.windows_pin(pair, least))
    newest, oldest = f"{pair[0]}.{pair[1]}.9.post1", text(max((*pair, 0), least))
    assert pin.name == "triton-windows" and newest in pin.specifier and oldest + ".post19" in pin.specifier
    assert f"{pair[0]}.{pair[1] + 1}.0.post1" not in pin.specifier and BEFORE[least] + ".post19" not in pin.specifier


def test_missing_altogether(monkeypatch):
    def import_module(name):
        raise ImportError("none here")

    monkeypatch.setattr(registry.importlib, "import_module", import_module)
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    found = registry._triton_missing.__wrapped__()
    assert found == f"not installed ({triton_advice.how_to_get('2.8.0+cu128')}): none here"


def test_the_tables_of_the_installation():
    rows = re.findall(r"^\| (\d+\.\d)(?: to \d+\.\d)? \| [^|]+ \| (\d\.\d(?:\.\d)?) to 3\.8", INSTALLATION, re.MULTILINE)
    assert rows == [(text(capability), text(least).removesuffix(".0")) for capability, least in LEAST.items()]
    torches, tritons = (re.search(rf"^\| {name} \| (2\.6.*|3\.2.*) \|$", INSTALLATION, re.MULTILINE)[1] for name in ("torch", "`triton-windows`"))
    named = {release: triton for cell, triton in zip(torches.split(" | "), tritons.split(" | "), strict=True) for release in cell.split(", ")}
    assert named == {text(release): text(pair) for release, pair in triton_advice.PAIRS.items()}
    assert "from 3.6 on" in INSTALLATION and max(triton_advice.PAIRS.values()) == (3, 8)
