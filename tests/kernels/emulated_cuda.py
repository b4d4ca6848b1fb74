"""The CUDA kernels on a CPU: their sources compiled for the host, with a block's threads as fibers (tests/cuda/emulator).

What it shows: the arithmetic, the index logic, which lane holds what, barriers, copies and bounds; of the kernels for
Hopper also races in shared memory. What it cannot show: races elsewhere, and speed.
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "cuda" / "emulator"
PREBUILT = {"cuda": "near_field_fa2", "cuda_fa3": "near_field_fa3"}


def compiler() -> list[str]:
    """A C++ compiler: the system's, or the one in the ziglang package."""
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    import ziglang

    return [str(Path(ziglang.__file__).parent / "zig"), "c++"]


@lru_cache(None)
def library(name: str = "near_field_fa2") -> ctypes.CDLL:
    """A kernel source, built once for each state of the sources, in .cache/."""
    sources = [*sorted(SOURCES.iterdir()), *sorted((ROOT / "cuda").glob("*.cu*"))]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    built = ROOT / ".cache" / "emulator" / f"{name}.{version}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:  # then moved: several workers may build at once
            fresh = Path(folder) / "fresh.so"
            subprocess.run(
                [*compiler(), "-O2", "-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", f"-I{SOURCES}",
                 f'-DSOURCE="{ROOT / "cuda" / name}.cu"', "-o", fresh, SOURCES / "near_field.cpp"],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            fresh.replace(built)
    return ctypes.CDLL(str(built))


class Module:
    """Stands where cuda/driver.py's Module stands."""

    def __init__(self, name: str = "near_field_fa2"):
        self.library, self.conflicts = library(name), ctypes.c_long()

    def kernel(self, name: str):
        return Kernel(self, name)


class Kernel:
    def __init__(self, module: Module, name: str):
        self.module, self.name = module, name
        self.function = getattr(module.library, name)  # AttributeError where there is none

    def launch(self, grid, block, shared_bytes, stream, params, keep_alive=()) -> None:
        library, message = self.module.library, ctypes.create_string_buffer(256)
        assert ctypes.sizeof(params) == library.parameter_bytes()
        failed = library.emulate(self.function, *grid, block[0], shared_bytes, ctypes.byref(params), message,
                                 ctypes.byref(self.module.conflicts))  # fmt: skip
        if failed:
            raise RuntimeError(f"{self.name}: {message.value.decode()}")
