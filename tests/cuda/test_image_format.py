"""Reading compiled files: oddities of real compilers, and damage, which must end in FormatError and nothing else."""

import contextlib
import ctypes
import random
import struct
from pathlib import Path

import pytest

NAME = "near_field_fa2"


@pytest.fixture
def image_format():
    from svg2_pack.cuda import image_format

    return image_format


@pytest.fixture
def cubin(prebuilt):
    return (prebuilt / f"{NAME}.sm_90.cubin").read_bytes()


def test_a_wrong_link_to_the_symbols(image_format, cubin):
    """CUDA 12.1 writes the number of another section there."""
    expected, changed = image_format.kernels(cubin), bytearray(cubin)
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    (names_offset,) = struct.unpack_from("<Q", cubin, table + 64 * names + 24)
    for i in range(count):
        (name,) = struct.unpack_from("<I", cubin, table + 64 * i)
        if cubin[names_offset + name :].startswith(b".nv.info\0"):
            struct.pack_into("<I", changed, table + 64 * i + 40, 5)
    assert changed != cubin and image_format.kernels(bytes(changed)) == expected


def test_damaged_files(image_format, cubin):
    """Truncated anywhere, bytes changed anywhere: a FormatError or an answer, in no time."""
    rng = random.Random(0)
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    for _ in range(300):
        broken = bytearray(cubin)
        for _ in range(rng.randrange(1, 20)):
            at = rng.choice([rng.randrange(64), rng.randrange(table, len(cubin)), rng.randrange(0x8000)])
            broken[at] = rng.randrange(256)
        for data in (bytes(broken), cubin[: rng.randrange(len(cubin))]):
            with contextlib.suppress(image_format.FormatError):
                image_format.kernels(data)
    for data in (b"", b"\x7fELF", b"text", b"\x7fELF\x01\x01" + bytes(200), cubin[:-5000]):
        with pytest.raises(image_format.FormatError):
            image_format.kernels(data)


def test_parameters_in_ptx(image_format):
    text = b""".version 8.7
.visible .entry one(
	.param .align 8 .b8 one_param_0[304]
)
.entry two(.param .u32 a, .param .u64 b, .param .align 4 .b8 c[12], .param .u8 d)
.entry none()"""
    sizes = {name: kernel.parameters for name, kernel in image_format.kernels(text).items()}
    assert sizes == {"one": 304, "two": 4 + 4 + 8 + 12 + 1, "none": 0}


def test_the_compilers_second_library_is_loaded_first(tmp_path, monkeypatch):
    """CUDA 13's does not find it by itself."""
    from svg2_pack.cuda import nvrtc

    for name in ("libnvrtc.so.13", "libnvrtc.alt.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc-builtins.alt.so.13.0"):
        (tmp_path / name).write_bytes(b"")
    loaded = []

    def load(path):
        loaded.append(Path(path).name)
        raise OSError("it is empty")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(ctypes, "WinDLL", load, raising=False)
    for library in (str(tmp_path / "libnvrtc.so.13"), "libnvrtc.so.13"):
        with pytest.raises(nvrtc.CompileError, match="does not load: it is empty"):
            nvrtc.Compiler(library)
    assert loaded == ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13", "libnvrtc.so.13"]
