"""Kernels compiled on the user's machine by torch's NVRTC, and the cache they are kept in. On a simulated compiler."""

import hashlib
import os
import threading
from pathlib import Path

import pytest
import torch

NAME = "near_field_fa2"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def compiler(prebuilt, simulate, monkeypatch):
    """compiler(...) -> FakeNvrtc that torch now has; no prebuilt file is left."""
    from fake_nvrtc import FakeNvrtc
    from svg2_pack.cuda import local_build

    cubin, ptx = (prebuilt / f"{NAME}.sm_120.cubin").read_bytes(), (prebuilt / f"{NAME}.ptx").read_bytes()
    for path in prebuilt.iterdir():
        path.unlink()

    def start(**options):
        fake = FakeNvrtc(cubin, ptx, **options)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(local_build, "libraries", lambda *arguments: [fake])
        return fake

    return start


def cached_files(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((12, 0), "sm_120"), ((8, 7), "compute_86"), ((13, 0), "compute_120")],
)
def test_the_next_step_compiles_the_same_source(simulate, driver, compiler, tmp_path, capability, target):
    from svg2_pack.cuda import sources

    nvrtc, fake = compiler(), simulate(capability, version=13000)
    module = driver.load(NAME, 0)
    assert module.origin == "compiled here by torch's NVRTC" and "manifest.json, is missing" in module.reasons[0]
    ((name, text, headers, options),) = nvrtc.compiled
    source = sources.find(NAME)
    assert name == source.file and text == (ROOT / "cuda" / source.file).read_text()
    assert headers["warp.cuh"] == (ROOT / "cuda" / "warp.cuh").read_text()
    assert options == [*sources.OPTIONS, f"--gpu-architecture={target}"]
    assert len(fake.images) == 1 and nvrtc.alive == 0 and not nvrtc.faults and not fake.faults
    assert len(cached_files(tmp_path)) == 1


@pytest.fixture
def build(compiler, simulate, monkeypatch):
    """build() -> bytes; build.nvrtc counts compilations."""
    from svg2_pack.cuda import local_build

    def run():
        return local_build.build(NAME, (8, 9))

    run.nvrtc = compiler()
    return run


def test_compiled_once(build, tmp_path):
    first = build()
    assert build() == first and len(build.nvrtc.compiled) == 1
    (file,) = cached_files(tmp_path)
    assert file.parent == tmp_path / "cache" / "svg2-sparse-attention" / "kernels"
    assert file.read_bytes() == f"svg2 {file.name} {hashlib.sha256(first).hexdigest()}\n".encode() + first


@pytest.mark.parametrize("spoil", ["flipped", "truncated", "empty", "foreign", "header only", "a folder"])
def test_a_spoilt_cache_file_is_compiled_again(build, tmp_path, spoil):
    first = build()
    (file,) = cached_files(tmp_path)
    data = file.read_bytes()
    if spoil == "flipped":
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif spoil == "truncated":
        file.write_bytes(data[:-100])
    elif spoil == "empty":
        file.write_bytes(b"")
    elif spoil == "foreign":  # whole, but of another key
        file.write_bytes(data.replace(file.name.encode(), b"0" * 64, 1))
    elif spoil == "header only":
        file.write_bytes(data.split(b"\n")[0])
    else:
        file.unlink()
        file.mkdir()
    assert build() == first and len(build.nvrtc.compiled) == 2
    if spoil != "a folder":
        assert file.read_bytes() == data
        assert build() == first and len(build.nvrtc.compiled) == 2


def test_another_source_or_compiler_is_another_file(build, tmp_path, monkeypatch):
    from svg2_pack.cuda import sources

    build()
    build.nvrtc.number = (12, 6)
    build()
    texts = sources.read(sources.find(NAME))
    monkeypatch.setattr(sources, "read", lambda source, folder=None: (texts[0] + "// changed", texts[1]))
    build()
    monkeypatch.setattr(sources, "OPTIONS", (*sources.OPTIONS, "-DX"))
    build()
    assert len(build.nvrtc.compiled) == len(cached_files(tmp_path)) == 4


def test_a_cache_that_cannot_be_written(build, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert build() == build() and len(build.nvrtc.compiled) == 2


def test_no_home_folder(build, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("LOCALAPPDATA", "")
    monkeypatch.setattr(Path, "home", nowhere)
    assert build() == build() and len(build.nvrtc.compiled) == 2


def test_many_writers_and_readers_never_see_half_a_file(tmp_path, simulate):
    """Sixteen threads store and load one key: what is read is whole, and of one writer."""
    from svg2_pack.cuda import cache

    simulate((8, 0))
    key, contents, wrong = "k" * 64, [bytes([i]) * 300_000 for i in range(8)], []

    def write(data):
        for _ in range(10):
            cache.store(key, data)

    def read():
        for _ in range(60):
            data = cache.load(key)
            if data is not None and data not in contents:
                wrong.append(data)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    threads += [threading.Thread(target=read) for _ in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.load(key) in contents
    assert [file.name for file in cached_files(tmp_path)] == [key]


def test_a_write_that_breaks_off_leaves_nothing(build, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    build()
    assert not cached_files(tmp_path)


def test_what_the_compiler_says_is_on_record(simulate, driver, compiler):
    simulate((8, 9))
    nvrtc = compiler(log="near_field_fa2.cu(12): error: identifier is undefined")
    assert "(12): error: identifier is undefined" in driver.why_not(NAME, 0) and nvrtc.alive == 0


def test_torch_without_cuda_has_no_compiler(simulate, driver, compiler, monkeypatch):
    simulate((8, 9))
    compiler()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is not a CUDA build" in driver.why_not(NAME, 0)


def test_a_compiler_that_is_too_old_for_its_gpu_or_does_not_load(simulate, driver, compiler, monkeypatch):
    from svg2_pack.cuda import local_build

    simulate((8, 0))
    compiler(architectures=(90, 100))
    assert "knows nothing older than compute capability 8.0" in driver.why_not(NAME, 0)
    monkeypatch.setattr(local_build, "libraries", lambda *arguments: ["libnvrtc-that-is-not-there.so"])
    driver.forget()
    assert "NVRTC does not load: libnvrtc-that-is-not-there.so" in driver.why_not(NAME, 0)


def test_a_source_for_one_architecture_is_made_for_no_other():
    from svg2_pack.cuda.local_build import target_for
    from svg2_pack.cuda.nvrtc import CompileError
    from svg2_pack.cuda.sources import Source

    hopper = Source("fa3", "fa3.cu", sass=("90a",))
    assert target_for(hopper, (9, 0), [80, 90, 100]) == "sm_90a"
    for capability in ((8, 9), (10, 0)):
        with pytest.raises(CompileError, match="not made for"):
            target_for(hopper, capability, [80, 89, 90, 100])


@pytest.mark.skipif(os.name == "nt", reason="the names of libraries on Linux")
def test_where_torchs_compiler_is_looked_for(tmp_path):
    """As in torch's wheels for CUDA 12 (a package of its own), CUDA 13 (one for all), before (in torch's own)."""
    from svg2_pack.cuda.local_build import libraries

    def found(cuda):
        return [
            str(p.relative_to(tmp_path)) for p in libraries(tmp_path / "torch", cuda) if tmp_path in Path(p).parents
        ]

    for path in (
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cuda_nvrtc/lib/libnvrtc.alt.so.12",
        "nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.8", "nvidia/cu13/lib/libnvrtc.so.13",
        "torch/lib/libnvrtc-672ee683.so.11.2", "torch/lib/libtorch.so",
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    assert found("12.8") == ["nvidia/cuda_nvrtc/lib/libnvrtc.so.12"]
    assert found("13.0") == ["nvidia/cu13/lib/libnvrtc.so.13"]
    assert found("11.8") == ["torch/lib/libnvrtc-672ee683.so.11.2"]
    assert libraries(tmp_path / "torch", "12.8")[-1] == "libnvrtc.so.12"
