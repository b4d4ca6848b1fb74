"""A compiler library with the prototypes of nvrtc.h. It "compiles" by giving a file."""

import ctypes
import re
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p

from fake_library import FakeLibrary

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


class FakeNvrtc(FakeLibrary):
    """cubin, ptx: what it gives out, the cubin with the wanted architecture in its header. log: of a failure."""

    def __init__(self, cubin=b"", ptx=b"", architectures=(80, 86, 89, 90, 100, 120), version=(12, 8), log=""):
        self.cubin, self.ptx, self.known, self.number, self.log = cubin, ptx, architectures, version, log
        self.compiled = []  # (name, text, headers, options)
        self.alive = 0  # programs
        self._programs, self._results = {}, {}
        super().__init__(_PROTOTYPES)

    def _nvrtcVersion(self, major, minor):
        major[0], minor[0] = self.number

    def _nvrtcGetNumSupportedArchs(self, out):
        out[0] = len(self.known)

    def _nvrtcGetSupportedArchs(self, out):
        for i, number in enumerate(self.known):
            out[i] = number

    def _nvrtcCreateProgram(self, out, text, name, count, texts, names):
        handle = 0x7D00_1111_2220 + 0x1_0000_0010 * len(self._programs)
        self._programs[handle] = (
            name.decode(),
            text.decode(),
            {names[i].decode(): texts[i].decode() for i in range(count)},
        )
        self.alive += 1
        out[0] = handle

    def _nvrtcCompileProgram(self, program, count, options):
        options = [options[i].decode() for i in range(count)]
        self.compiled.append((*self._programs[program], options))
        (target,) = (re.fullmatch("--gpu-architecture=(sm|compute)_(.*)", o) for o in options if "architecture" in o)
        cubin = bytearray(self.cubin)
        if target[1] == "sm" and cubin:
            number, wide = int(target[2].rstrip("a")), cubin[8] >= 8
            cubin[0x31 if wide else 0x30] = number
        self._results[program] = {"ProgramLog": self.log.encode() + b"\0", "CUBIN": bytes(cubin), "PTX": self.ptx + b"\0"}
        return 6 if self.log else 0

    def _nvrtcDestroyProgram(self, program):
        self.alive -= 1

    def _called(self, function, arguments):
        """What a program gives comes in two calls: how many bytes, then the bytes."""
        wanted = re.fullmatch("nvrtcGet(ProgramLog|CUBIN|PTX)(Size)?", function)
        if not wanted:
            return super()._called(function, arguments)
        program, out = arguments
        data = self._results[program][wanted[1]]
        if wanted[2]:
            out[0] = len(data)
        else:
            ctypes.memmove(out, data, len(data))
