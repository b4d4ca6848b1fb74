"""A compiler library made of C function pointers, with the prototypes of nvrtc.h. It "compiles" by giving a file."""

import ctypes
import re
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_void_p

from fake_driver import _Pointer

_PROTOTYPES = {
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


class FakeNvrtc:
    """cubin, ptx: what it gives out, the cubin with the wanted architecture in its header. log: of a failure."""

    def __init__(self, cubin=b"", ptx=b"", architectures=(80, 86, 89, 90, 100, 120), version=(12, 8), log=""):
        self.cubin, self.ptx, self.known, self.number, self.log = cubin, ptx, architectures, version, log
        self.compiled = []  # (name, text, headers, options)
        self.alive = 0  # programs
        self._programs, self._results, self._kept = {}, {}, []
        for function, types in _PROTOTYPES.items():
            callback = CFUNCTYPE(c_int, *types)(getattr(self, "_" + function))
            self._kept.append(callback)
            setattr(self, function, _Pointer(ctypes.cast(callback, c_void_p).value))

    def _nvrtcVersion(self, major, minor):
        major[0], minor[0] = self.number
        return 0

    def _nvrtcGetNumSupportedArchs(self, out):
        out[0] = len(self.known)
        return 0

    def _nvrtcGetSupportedArchs(self, out):
        for i, number in enumerate(self.known):
            out[i] = number
        return 0

    def _nvrtcCreateProgram(self, out, text, name, count, texts, names):
        handle = 0x7D00_1111_2220 + 0x1_0000_0010 * len(self._programs)
        self._programs[handle] = (
            name.decode(),
            text.decode(),
            {names[i].decode(): texts[i].decode() for i in range(count)},
        )
        self.alive += 1
        out[0] = handle
        return 0

    def _nvrtcCompileProgram(self, program, count, options):
        options = [options[i].decode() for i in range(count)]
        self.compiled.append((*self._programs[program], options))
        (target,) = (re.fullmatch("--gpu-architecture=(sm|compute)_(.*)", o) for o in options if "architecture" in o)
        cubin = bytearray(self.cubin)
        if target[1] == "sm" and cubin:
            number, wide = int(target[2].rstrip("a")), cubin[8] >= 8
            cubin[0x31 if wide else 0x30] = number
        self._results[program] = bytes(cubin)
        return 6 if self.log else 0

    def _nvrtcDestroyProgram(self, program):
        self.alive -= 1
        return 0

    def _give(self, data, out):
        ctypes.memmove(out, data, len(data))
        return 0

    def _size(self, data, out):
        out[0] = len(data)
        return 0

    def _nvrtcGetProgramLogSize(self, program, out):
        return self._size(self.log.encode() + b"\0", out)

    def _nvrtcGetProgramLog(self, program, out):
        return self._give(self.log.encode() + b"\0", out)

    def _nvrtcGetCUBINSize(self, program, out):
        return self._size(self._results[program], out)

    def _nvrtcGetCUBIN(self, program, out):
        return self._give(self._results[program], out)

    def _nvrtcGetPTXSize(self, program, out):
        return self._size(self.ptx + b"\0", out)

    def _nvrtcGetPTX(self, program, out):
        return self._give(self.ptx + b"\0", out)
