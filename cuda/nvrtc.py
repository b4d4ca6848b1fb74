"""NVIDIA's runtime compiler (NVRTC) through ctypes: a source text in, machine code or PTX out. Needs no package."""

from __future__ import annotations

import contextlib
import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

_FUNCTIONS = {
    "nvrtcVersion": (POINTER(c_int), POINTER(c_int)),
    "nvrtcGetNumSupportedArchs": (POINTER(c_int),),
    "nvrtcGetSupportedArchs": (POINTER(c_int),),
    "nvrtcCreateProgram": (POINTER(c_void_p), c_char_p, c_char_p, c_int, POINTER(c_char_p), POINTER(c_char_p)),
    "nvrtcCompileProgram": (c_void_p, c_int, POINTER(c_char_p)),
    "nvrtcDestroyProgram": (POINTER(c_void_p),),
    "nvrtcGetProgramLogSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (c_void_p, c_void_p),
    "nvrtcGetCUBINSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (c_void_p, c_void_p),
    "nvrtcGetPTXSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetPTX": (c_void_p, c_void_p),
}


class CompileError(RuntimeError):
    """NVRTC cannot be used, or refused a source; the text holds what it printed."""


class Compiler:
    """One NVRTC library.

    library: its path or name, or (in tests) an object with its functions. Raises CompileError where it does not load.
    """

    def __init__(self, library: str | Path | object):
        if isinstance(library, (str, Path)):
            load = ctypes.WinDLL if os.name == "nt" else ctypes.CDLL
            if os.path.isabs(library):
                _load_builtins(Path(library).parent, load)
            try:
                library = load(str(library))
            except OSError as error:
                raise CompileError(f"NVRTC does not load: {error}") from error
        self._functions = {}
        for name, arguments in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise CompileError(f"this NVRTC is too old: it has no {name}") from error
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function

    def _call(self, name: str, *arguments) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise CompileError(f"{name} failed with NVRTC error {code}")

    @property
    def version(self) -> tuple[int, int]:
        """(major, minor) of the toolkit it belongs to."""
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        return major.value, minor.value

    def architectures(self) -> list[int]:
        """What it compiles for, as 80 for compute capability 8.0, ascending."""
        count = c_int()
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        found = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return sorted(found)

    def compile(self, name: str, text: str, headers: dict[str, str], options: list[str]) -> tuple[bytes, str]:
        """(compiled file, what the compiler printed); machine code where the architecture is sm_*, else PTX.

        name: what the source is called in messages; no path. Raises CompileError with the log.
        """
        program = c_void_p()
        texts, names = _strings(headers.values()), _strings(headers)
        self._call(
            "nvrtcCreateProgram", byref(program), text.encode(), name.encode(), len(headers), texts, names
        )  # fmt: skip
        try:
            failed = self._functions["nvrtcCompileProgram"](program, len(options), _strings(options))
            log = self._get(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if failed:
                raise CompileError(f"NVRTC did not compile {name}: {log.strip() or f'error {failed}'}")
            if any(option.startswith("--gpu-architecture=sm_") for option in options):
                return self._get(program, "CUBIN"), log
            return self._get(program, "PTX").rstrip(b"\0"), log
        finally:
            self._call("nvrtcDestroyProgram", byref(program))

    def _get(self, program: c_void_p, what: str) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{what}Size", program, byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, data)
        return data.raw


def _load_builtins(folder: Path, load) -> None:
    """NVRTC's second library, which it asks the system for by name: that of CUDA 13 does not look in its own folder."""
    for path in folder.glob("*nvrtc-builtins*"):
        if ".alt." not in path.name:
            with contextlib.suppress(OSError):
                load(str(path))


def _strings(texts) -> ctypes.Array:
    texts = [text.encode() for text in texts]
    return (c_char_p * len(texts))(*texts)
