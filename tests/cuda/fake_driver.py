"""A driver library with the prototypes of cuda.h.

It keeps what it is told (calls, images, the bytes of parameters) and follows NVIDIA's published rules: which machine
code runs on which GPU (by the file's own ELF header), which context is current on a thread, how much shared memory a
launch may ask for. Standard library only. Written from cuda.h and the programming guide, not from cuda/api.py.
"""

import ctypes
import struct
import threading
from ctypes import POINTER, c_char_p, c_int, c_uint, c_void_p

from fake_library import FakeLibrary

NAMES = {
    1: "CUDA_ERROR_INVALID_VALUE",
    2: "CUDA_ERROR_OUT_OF_MEMORY",
    3: "CUDA_ERROR_NOT_INITIALIZED",
    100: "CUDA_ERROR_NO_DEVICE",
    101: "CUDA_ERROR_INVALID_DEVICE",
    200: "CUDA_ERROR_INVALID_IMAGE",
    201: "CUDA_ERROR_INVALID_CONTEXT",
    209: "CUDA_ERROR_NO_BINARY_FOR_GPU",
    218: "CUDA_ERROR_INVALID_PTX",
    222: "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    400: "CUDA_ERROR_INVALID_HANDLE",
    500: "CUDA_ERROR_NOT_FOUND",
    700: "CUDA_ERROR_ILLEGAL_ADDRESS",
    701: "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
}
_OUT = POINTER(c_void_p)
_PROTOTYPES = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, c_int),
    "cuCtxGetCurrent": (_OUT,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_OUT,),
    "cuModuleLoadDataEx": (_OUT, c_void_p, c_uint, POINTER(c_int), _OUT),
    "cuModuleGetFunction": (_OUT, c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, _OUT, _OUT),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


_NEED_CONTEXT = {name for name in _PROTOTYPES if name.startswith(("cuModule", "cuFunc", "cuLaunch"))}


class FakeDriver(FakeLibrary):
    """capabilities: (major, minor) of each GPU. version: as cuDriverGetVersion. fail: function -> code it returns."""

    def __init__(self, *capabilities, version=12080, name="NVIDIA GeForce RTX 4090", optin=101376, fail=None):
        self.capabilities, self.version, self.name, self.optin = capabilities, version, name, optin
        self.fail = dict(fail or {})
        self.calls = []  # (function, thread, arguments)
        self.images = {}  # module -> its bytes
        self.owners = {}  # module -> the context it was loaded in
        self.functions = {}  # function -> (module, name)
        self.limits = {}  # function -> dynamic shared memory it may have
        self.launches = []  # dicts
        self.parameter_bytes = 0  # how many to copy from the first parameter at a launch
        self.stacks = {}  # thread -> contexts
        self._next, self._lock = 0x7F00_1234_5000, threading.Lock()
        super().__init__(_PROTOTYPES)

    def _called(self, function, arguments):
        with self._lock:
            self.calls.append((function, threading.get_ident(), arguments))
        if function in self.fail and not function.startswith("cuGetError"):
            return self.fail[function]
        if function in _NEED_CONTEXT and not self._stack():
            return 201
        return super()._called(function, arguments)

    def names(self):
        return [function for function, _, _ in self.calls]

    def _handle(self):
        with self._lock:
            self._next += 0x1_0000_0010  # differs above the 32nd bit: a truncated handle is noticed
            return self._next

    def _stack(self):
        return self.stacks.setdefault(threading.get_ident(), [])

    def context_of(self, index):
        return 0x7E00_0000_0000 + 0x1_0000_0000 * index

    def _cuInit(self, flags):
        return 0 if self.capabilities else 100

    def _cuDriverGetVersion(self, out):
        out[0] = self.version

    def _cuDeviceGetCount(self, out):
        out[0] = len(self.capabilities)

    def _cuDeviceGet(self, out, ordinal):
        if not 0 <= ordinal < len(self.capabilities):
            return 101
        out[0] = ordinal

    def _cuDeviceGetName(self, out, size, device):
        text = self.name.encode()[: size - 1] + b"\0"
        ctypes.memmove(out, text, len(text))

    def _cuDeviceGetAttribute(self, out, attribute, device):
        major, minor = self.capabilities[device]
        out[0] = {75: major, 76: minor, 97: self.optin}[attribute]

    def _cuDevicePrimaryCtxRetain(self, out, device):
        out[0] = self.context_of(device)

    def _cuCtxGetCurrent(self, out):
        out[0] = self._stack()[-1] if self._stack() else None

    def _cuCtxPushCurrent_v2(self, context):
        self._stack().append(context)

    def _cuCtxPopCurrent_v2(self, out):
        if not self._stack():
            return 201
        out[0] = self._stack().pop()

    def _cuModuleLoadDataEx(self, out, data, count, options, values):
        index = [self.context_of(i) for i in range(len(self.capabilities))].index(self._stack()[-1])
        image = image_at(data)
        if image.startswith(b"\x7fELF"):
            if not runs_on(architecture(image), self.capabilities[index]):
                return 209
        elif b".version" not in image:
            return 200
        elif ptx_version(image) > self.version:
            for i in range(count):
                if options[i] == 5:
                    said = b"ptxas fatal: Unsupported .version 8.7"
                    ctypes.memmove(values[i], said + b"\0", len(said) + 1)
            return 222
        module = self._handle()
        self.images[module], self.owners[module] = image, self._stack()[-1]
        out[0] = module

    def _cuModuleGetFunction(self, out, module, name):
        if name not in self.images[module]:
            return 500
        function = self._handle()
        self.functions[function] = (module, name.decode())
        self.limits[function] = 49152
        out[0] = function

    def _cuFuncGetAttribute(self, out, attribute, function):
        out[0] = {1: 128, 3: 0, 4: 168, 8: self.limits[function]}[attribute]

    def _cuFuncSetAttribute(self, function, attribute, value):
        if attribute != 8 or value > self.optin:
            return 1
        self.limits[function] = value

    def _cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        if shared > self.limits[function]:
            return 1
        if self.limits[function] > self.optin or self._stack()[-1] != self.owners[self.functions[function][0]]:
            return 400
        self.launches.append(
            {
                "function": function,
                "kernel": self.functions[function][1],
                "grid": (gx, gy, gz),
                "block": (bx, by, bz),
                "shared": shared,
                "stream": stream,
                "parameters": ctypes.string_at(parameters[0], self.parameter_bytes),
                "extra": bool(extra),
                "context": self._stack()[-1],
            }
        )

    def _cuGetErrorName(self, code, out):
        if code not in NAMES:
            return 1
        out[0] = self._text(NAMES[code])

    def _cuGetErrorString(self, code, out):
        if code not in NAMES:
            return 1
        out[0] = self._text("words for " + str(code))

    def _text(self, text):
        buffer = ctypes.create_string_buffer(text.encode())
        self._kept.append(buffer)
        return ctypes.addressof(buffer)


def image_at(address):
    """All bytes of the file at this address, as long as its own headers say."""
    head = ctypes.string_at(address, 4)
    if head != b"\x7fELF":
        return ctypes.string_at(address)  # text ends with a zero
    header = ctypes.string_at(address, 64)
    programs, sections = struct.unpack_from("<QQ", header, 0x20)
    _, program_bytes, program_count, section_bytes, section_count, _ = struct.unpack_from("<6H", header, 0x34)
    return ctypes.string_at(
        address, max(programs + program_bytes * program_count, sections + section_bytes * section_count)
    )


def architecture(image):
    """The number in the flags of a cubin's ELF header: 89 for sm_89. Its place moved with version 8 of the format."""
    (flags,) = struct.unpack_from("<I", image, 0x30)
    return flags >> 8 & 0xFF if image[8] >= 8 else flags & 0xFF


def runs_on(number, capability):
    """CUDA programming guide, "Binary compatibility": the same major version, no lower minor one; not on Tegra."""
    major, minor = divmod(number, 10)
    return capability[0] == major and capability[1] >= minor and capability not in ((8, 7), (10, 1))


def ptx_version(text):
    """The first CUDA version, as 12080, whose driver takes this PTX (PTX manual, release history)."""
    major, minor = text.split(b".version", 1)[1].split(None, 1)[0].split(b".")
    first = {7: 11000, 8: 12000, 9: 13000}[int(major)]
    skipped = major == b"8" and int(minor) >= 6  # 8.5 came with 12.5 and 12.6
    return first + 10 * (int(minor) + skipped)
