"""Kernels on a GPU: load a source's kernels once per device, launch them on torch's stream, name what fails.

    module = driver.load("near_field_fa2", q.device)
    module.kernel("svg2_near_field_bf16_128_64").launch((tiles, rows), (128,), 82_688, None, params, keep_alive=(q, k, v))

`load` takes the first that works of: prebuilt machine code, prebuilt PTX, the same source compiled by torch's NVRTC.
What failed before is in `module.reasons`. Nothing happens at import, and every function may be called from any thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Sequence
from ctypes import byref, c_int, c_void_p

import torch

from . import api, image_format, images, local_build, sources
from .api import DeviceFault, Driver, DriverError, LaunchRefused


class OutOfMemory(DriverError, torch.OutOfMemoryError):
    """The GPU's memory is full. Caught wherever torch's own out-of-memory error is."""


api.ERRORS[2] = OutOfMemory  # here, because api.py does without torch


class NoImage(RuntimeError):
    """No file of a kernel source works on a GPU. reasons: one sentence for each that was tried."""

    def __init__(self, name: str, reasons: Sequence[str]):
        self.reasons = list(reasons)
        super().__init__(f"{name} cannot be loaded: " + "; ".join(reasons))


class Context:
    """A GPU's primary context: the one torch works in."""

    def __init__(self, driver: Driver, index: int):
        self.driver, self.index = driver, index
        self.device = driver.number("cuDeviceGet", index)
        self.handle = driver.handle("cuDevicePrimaryCtxRetain", self.device)
        self.capability = driver.capability(self.device)

    @contextlib.contextmanager
    def current(self):
        """Make it the calling thread's for a while. A thread that torch has not used yet has none, or another GPU's."""
        if self.driver.handle("cuCtxGetCurrent").value == self.handle.value:
            yield
            return
        self.driver("cuCtxPushCurrent_v2", self.handle)
        try:
            yield
        finally:
            self.driver("cuCtxPopCurrent_v2", byref(c_void_p()))


class Kernel:
    """One kernel of a loaded module. name; parameters: bytes of its parameters."""

    def __init__(self, context: Context, module: c_void_p, name: str, parameters: int):
        self.name, self.parameters = name, parameters
        self._context, self._driver, self._lock = context, context.driver, threading.Lock()
        self._function = self._driver.handle("cuModuleGetFunction", module, name.encode())
        self._dynamic_shared = self._attribute(api.FUNCTION_MAX_DYNAMIC_SHARED)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        stream: int | torch.cuda.Stream | None,
        params: ctypes.Structure,
        keep_alive: Iterable[torch.Tensor] = (),
    ) -> None:
        """Put the kernel on a stream and return at once.

        grid, block: one to three numbers. shared_bytes: dynamic shared memory of a program. stream: None is torch's
        current one of this GPU. params: the kernel's one parameter, copied during the call. keep_alive: the tensors
        that it points into; they are held until the kernel is on the stream. After that torch's allocator does not give
        their memory to others before the kernel has run, provided they were allocated on this stream (else use
        Tensor.record_stream).

        Raises ValueError where params has not the size the kernel expects, and DriverError.
        """
        if ctypes.sizeof(params) != self.parameters:
            raise ValueError(f"{self.name} takes {self.parameters} bytes of parameters, not {ctypes.sizeof(params)}")
        if stream is None:
            stream = torch.cuda.current_stream(self._context.index)
        stream = getattr(stream, "cuda_stream", stream)
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        pointers = (c_void_p * 1)(ctypes.addressof(params))
        with self._context.current():
            if shared_bytes > self._dynamic_shared:
                self._raise_shared_limit(shared_bytes)
            self._driver("cuLaunchKernel", self._function, *grid, *block, shared_bytes, stream, pointers, None)
        del keep_alive

    def resources(self) -> dict[str, int]:
        """What the loaded code needs: registers and bytes of local memory per thread, bytes of static shared memory."""
        names = {"registers": api.FUNCTION_REGISTERS, "local": api.FUNCTION_LOCAL, "shared": api.FUNCTION_STATIC_SHARED}
        with self._context.current():
            return {name: self._attribute(number) for name, number in names.items()}

    def _attribute(self, number: int) -> int:
        return self._driver.number("cuFuncGetAttribute", number, self._function)

    def _raise_shared_limit(self, shared_bytes: int) -> None:
        with self._lock:
            if shared_bytes <= self._dynamic_shared:
                return
            most = self._driver.number("cuDeviceGetAttribute", api.SHARED_MEMORY_OPTIN, self._context.device)
            if shared_bytes > most:
                detail = f"{self.name} needs {shared_bytes} bytes of shared memory, this GPU has {most} for one program"
                raise LaunchRefused("cuFuncSetAttribute", 701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", detail)
            self._driver("cuFuncSetAttribute", self._function, api.FUNCTION_MAX_DYNAMIC_SHARED, shared_bytes)
            self._dynamic_shared = shared_bytes


class Module:
    """The kernels of one source on one GPU. origin: the file they came from; reasons: why not a better one."""

    def __init__(self, context: Context, name: str, origin: str, data: bytes, reasons: Sequence[str]):
        self.name, self.origin, self.reasons = name, origin, tuple(reasons)
        found = image_format.kernels(data)
        with context.current():
            handle = _load_data(context.driver, data)
            self._kernels = {
                symbol: Kernel(context, handle, symbol, kernel.parameters) for symbol, kernel in found.items()
            }

    def kernel(self, name: str) -> Kernel:
        """The kernel called `name`; KeyError if the source has none such."""
        return self._kernels[name]

    @property
    def kernels(self) -> tuple[str, ...]:
        return tuple(self._kernels)


_lock = threading.RLock()
_driver: Driver | None = None
_contexts: dict[int, Context] = {}
_modules: dict[tuple[str, int], Module | NoImage] = {}


def load(name: str, device: torch.device | int) -> Module:
    """The kernels of source `name` (see sources.py) on a GPU, loaded at the first call; a failure is remembered too.

    Raises NoImage where no file works, NoDriver without a driver or GPU, OutOfMemory (not remembered), DeviceFault, and
    ValueError for a name that is not in the table or a device that is no GPU.
    """
    sources.find(name)
    with _lock:
        context = _context(device)
        key = name, context.handle.value
        found = _modules.get(key)
        if found is None:
            try:
                found = _load(name, context)
            except NoImage as error:
                found = error
            _modules[key] = found
    if isinstance(found, NoImage):
        raise NoImage(name, found.reasons)
    return found


def why_not(name: str, device: torch.device | int) -> str | None:
    """None where `load` succeeds (it is called here), else the reason as one sentence. Raises OutOfMemory."""
    try:
        load(name, device)
    except OutOfMemory:
        raise
    except (NoImage, DriverError) as error:
        return str(error)
    return None


def forget() -> None:
    """Start over at the next `load`: for the Doctor's retry and for tests. Kernels in use stay valid."""
    global _driver
    with _lock:
        _driver = None
        _contexts.clear()
        _modules.clear()


def _context(device: torch.device | int) -> Context:
    global _driver
    index = device
    if isinstance(device, torch.device):
        if device.type != "cuda":
            raise ValueError(f"cuda: kernels run on NVIDIA GPUs, not on {device}")
        index = torch.cuda.current_device() if device.index is None else device.index
    if _driver is None:
        driver = Driver.load()
        driver("cuInit", 0)
        _driver = driver
    if index not in _contexts:
        _contexts[index] = Context(_driver, index)
    return _contexts[index]


def _load(name: str, context: Context) -> Module:
    capability = context.capability
    prebuilt, reasons = images.usable(name, capability, context.driver.version())
    steps = [(str(image), lambda image=image: images.read(image)) for image in prebuilt]
    steps.append(("compiled here by torch's NVRTC", lambda: local_build.build(name, capability)))
    for origin, read in steps:
        try:
            return Module(context, name, origin, read(), reasons)
        except (OutOfMemory, DeviceFault):  # these say nothing about the file
            raise
        except Exception as error:
            reasons.append(f"{origin}: {error}")
    raise NoImage(name, reasons)


def _load_data(driver: Driver, data: bytes) -> c_void_p:
    log = ctypes.create_string_buffer(4096)
    options = (c_int * 2)(api.JIT_ERROR_LOG, api.JIT_ERROR_LOG_BYTES)
    values = (c_void_p * 2)(ctypes.addressof(log), len(log))
    try:
        return driver.handle("cuModuleLoadDataEx", data, 2, options, values)
    except DriverError as error:
        said = log.value.decode(errors="replace").strip()
        if not said:
            raise
        raise driver.error("cuModuleLoadDataEx", error.code, f" ({said})") from None
