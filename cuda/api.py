"""The CUDA driver's functions through ctypes, and its errors as named exceptions. Standard library only.

Importing this calls nothing. `Driver.load()` opens the library that comes with the NVIDIA driver.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p

_HANDLE = POINTER(c_void_p)
_FUNCTIONS = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuCtxGetCurrent": (_HANDLE,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_HANDLE,),
    "cuModuleLoadDataEx": (_HANDLE, c_void_p, c_uint, POINTER(c_int), _HANDLE),
    "cuModuleGetFunction": (_HANDLE, c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    # function, grid x y z, block x y z, bytes of dynamic shared memory, stream, parameters, extra
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, _HANDLE, _HANDLE),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}

# CUdevice_attribute, CUfunction_attribute and CUjit_option.
CAPABILITY_MAJOR, CAPABILITY_MINOR, SHARED_MEMORY_OPTIN = 75, 76, 97
FUNCTION_STATIC_SHARED, FUNCTION_LOCAL, FUNCTION_REGISTERS, FUNCTION_MAX_DYNAMIC_SHARED = 1, 3, 4, 8
JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES = 5, 6


class DriverError(RuntimeError):
    """A call of the driver failed. code: CUresult; name: as in CUDA_ERROR_...; detail: the driver's words."""

    advice = ""

    def __init__(self, function: str, code: int, name: str, detail: str):
        self.function, self.code, self.name, self.detail = function, code, name, detail
        super().__init__(f"{function}: {name} ({code}): {detail}{'; ' if self.advice else ''}{self.advice}")


class NoDriver(DriverError):
    """There is no usable NVIDIA driver or GPU on this machine."""


class DriverTooOld(DriverError):
    """The driver is older than the file it was given."""

    advice = "the NVIDIA driver is too old for this file: update it"


class InvalidImage(DriverError):
    """The file is damaged, or for another GPU architecture or a newer driver."""

    advice = "the file is damaged, for another GPU, or made for a newer NVIDIA driver"


class KernelNotFound(DriverError):
    """The loaded file holds no kernel of that name."""


class LaunchRefused(DriverError):
    """The kernel needs more registers, threads or shared memory than the GPU gives one program."""


class DeviceFault(DriverError):
    """A kernel failed while it ran, this one or an earlier one. The process cannot use the GPU any more."""

    advice = "a kernel failed on the GPU: ComfyUI has to be restarted"


ERRORS: dict[int, type[DriverError]] = {
    **dict.fromkeys((3, 4, 34, 46, 100, 101, 802, 803, 804), NoDriver),
    **dict.fromkeys((222,), DriverTooOld),
    **dict.fromkeys((200, 209, 218, 300), InvalidImage),
    **dict.fromkeys((500,), KernelNotFound),
    **dict.fromkeys((701,), LaunchRefused),
    **dict.fromkeys((700, 702, 710, *range(714, 720)), DeviceFault),
}


class Driver:
    """The driver's functions: `driver("cuInit", 0)` raises the named exception where the result is not CUDA_SUCCESS."""

    def __init__(self, library: object):
        """library: what `load` opened, or (in tests) an object with the functions as attributes."""
        self._functions = {}
        for name, arguments in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise DriverTooOld(name, -1, "MISSING_FUNCTION", "the NVIDIA driver does not have it") from None
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function

    @classmethod
    def load(cls) -> Driver:
        """The driver of this machine. Raises NoDriver where none is installed."""
        name, load = ("nvcuda.dll", "WinDLL") if os.name == "nt" else ("libcuda.so.1", "CDLL")
        try:
            library = getattr(ctypes, load)(name)
        except OSError as error:
            raise NoDriver(name, -1, "NO_LIBRARY", f"no NVIDIA driver is installed ({error})") from error
        return cls(library)

    def __call__(self, name: str, *arguments) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise self.error(name, code)

    def error(self, function: str, code: int, detail: str = "") -> DriverError:
        """The exception for a result code; detail: more to say after the driver's own words."""
        texts = []
        for query in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            known = self._functions[query](code, byref(text)) == 0 and text.value
            texts.append(text.value.decode(errors="replace") if known else "unknown error")
        return ERRORS.get(code, DriverError)(function, code, texts[0], texts[1] + detail)

    def number(self, function: str, *arguments) -> int:
        """The result of a function whose first argument is where it writes an int."""
        result = c_int()
        self(function, byref(result), *arguments)
        return result.value

    def handle(self, function: str, *arguments) -> c_void_p:
        """The result of a function whose first argument is where it writes a handle."""
        result = c_void_p()
        self(function, byref(result), *arguments)
        return result

    def capability(self, device: int) -> tuple[int, int]:
        """Compute capability of a device (as cuDeviceGet returned it)."""
        return tuple(self.number("cuDeviceGetAttribute", a, device) for a in (CAPABILITY_MAJOR, CAPABILITY_MINOR))

    def version(self) -> tuple[int, int]:
        """The newest CUDA version the driver knows, as (12, 8)."""
        number = self.number("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10
