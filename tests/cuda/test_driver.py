"""What reaches the NVIDIA driver: parameters, launches, contexts; and what refusals become. On a simulated driver."""

import ctypes
import threading
import weakref

import pytest
import torch

NAME = "near_field_fa2"


def some_kernel(module):
    return module.kernel(module.kernels[0])


def make_params(size, **values):
    """A structure of `size` bytes whose first fields cover every kind of field the kernels have."""
    fields = [("p", ctypes.c_void_p), ("n", ctypes.c_int64), ("scale", ctypes.c_float), ("heads", ctypes.c_int32)]
    return type("Params", (ctypes.Structure,), {"_fields_": [*fields, ("rest", ctypes.c_ubyte * (size - 24))]})(
        **values
    )


@pytest.fixture
def launched(simulate, driver):
    """(fake driver, a kernel of a loaded module, parameters for it)"""
    fake = simulate((8, 9), (9, 0))
    kernel = some_kernel(driver.load(NAME, torch.device("cuda", 0)))
    fake.parameter_bytes = kernel.parameters
    params = make_params(kernel.parameters, p=0x7FAB_CDEF_1230, n=-(1 << 40) + 7, scale=-0.1, heads=-40)
    for i in range(len(params.rest)):
        params.rest[i] = (7 * i + 1) % 256
    return fake, kernel, params


def test_a_launch_arrives_as_it_was_asked_for(launched):
    fake, kernel, params = launched
    kernel.launch((70_001, 40), (128,), 0, 0x7ACE_0000_1230, params)
    assert fake.launches == [
        {
            "function": fake.launches[0]["function"],
            "kernel": kernel.name,
            "grid": (70_001, 40, 1),
            "block": (128, 1, 1),
            "shared": 0,
            "stream": 0x7ACE_0000_1230,
            "parameters": bytes(params),
            "extra": False,
            "context": fake.context_of(0),
        }
    ]
    arrived = type(params).from_buffer_copy(fake.launches[0]["parameters"])
    assert arrived.p == 0x7FAB_CDEF_1230 and arrived.n == -(1 << 40) + 7 and arrived.heads == -40
    assert arrived.scale == ctypes.c_float(-0.1).value and list(arrived.rest) == list(params.rest)
    assert not fake.faults


def test_the_parameter_size_is_that_of_the_compiled_kernel(launched, manifest):
    fake, kernel, _ = launched
    assert kernel.parameters == manifest[f"{NAME}.sm_89.cubin"]["kernels"][kernel.name]["parameters"]
    for size in (kernel.parameters - 8, kernel.parameters + 8):
        with pytest.raises(ValueError, match=f"takes {kernel.parameters} bytes of parameters, not {size}"):
            kernel.launch((1,), (128,), 0, 0, make_params(size))
    assert not fake.launches


def test_the_stream_is_torchs_current_one_of_this_gpu(launched, monkeypatch):
    fake, kernel, params = launched

    class Stream:
        cuda_stream = 0x7BBB_0000_0010

    asked = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: asked.append(device) or Stream)
    kernel.launch((1,), (32, 2, 2), 0, None, params)
    kernel.launch((1, 2, 3), (128,), 0, Stream, params)
    assert [launch["stream"] for launch in fake.launches] == [Stream.cuda_stream] * 2 and asked == [0]
    assert fake.launches[0]["block"] == (32, 2, 2) and fake.launches[1]["grid"] == (1, 2, 3)


def test_shared_memory_is_raised_once_before_the_first_launch(launched):
    fake, kernel, params = launched
    for shared in (1536, 98_304, 98_304, 65_536):
        kernel.launch((1,), (128,), shared, 0, params)
    kinds = [(name, arguments) for name, _, arguments in fake.calls if name in ("cuFuncSetAttribute", "cuLaunchKernel")]
    assert [name for name, _ in kinds] == ["cuLaunchKernel", "cuFuncSetAttribute", *["cuLaunchKernel"] * 3]
    assert kinds[1][1] == (fake.launches[0]["function"], 8, 98_304)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert [launch["shared"] for launch in fake.launches] == [1536, 98_304, 98_304, 65_536]


def test_shared_memory_is_never_lowered(launched):
    """As when a thread that needs less waited while another raised the limit."""
    fake, kernel, params = launched
    kernel.launch((1,), (128,), 98_304, 0, params)
    kernel._raise_shared_limit(65_536)
    kernel.launch((1,), (128,), 98_304, 0, params)
    assert list(fake.limits.values()).count(98_304) == 1


def test_more_shared_memory_than_there_is(launched, driver):
    fake, kernel, params = launched
    with pytest.raises(driver.LaunchRefused, match="needs 200000 bytes of shared memory, this GPU has 101376"):
        kernel.launch((1,), (128,), 200_000, 0, params)
    assert not fake.launches


def test_tensors_live_until_the_kernel_is_on_the_stream(launched):
    fake, kernel, params = launched
    seen = []
    fake._cuLaunchKernel = lambda *arguments: seen.append(kept() is not None)

    def tensors():
        nonlocal kept
        tensor = torch.zeros(3)
        kept = weakref.ref(tensor)
        return (tensor,)

    kept = None
    kernel.launch((1,), (128,), 0, 0, params, tensors())
    assert seen == [True] and kept() is None


def test_threads_load_once_per_gpu_and_launch_in_its_context(simulate, driver):
    fake = simulate((8, 9), (9, 0))
    barrier, failures = threading.Barrier(8), []

    def work(number):
        index = number % 2
        try:
            barrier.wait()
            kernel = some_kernel(driver.load(NAME, torch.device("cuda", index)))
            for _ in range(20):
                kernel.launch((number + 1,), (128,), 99_000, 0x10 * (number + 1), make_params(kernel.parameters))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not fake.faults
    assert fake.names().count("cuModuleLoadDataEx") == 2 and fake.names().count("cuDevicePrimaryCtxRetain") == 2
    assert fake.names().count("cuFuncSetAttribute") == 2
    assert len(fake.launches) == 160
    for launch in fake.launches:
        assert launch["context"] == fake.context_of((launch["grid"][0] - 1) % 2)
        assert launch["stream"] == 0x10 * launch["grid"][0]
    assert not any(fake.stacks.values())  # every thread has the context back that it had


def test_a_context_that_is_current_is_left_alone(launched, driver):
    """The other GPU's context on this thread is put aside for the launch and back; its own is used as it is."""
    fake, kernel, params = launched
    stack = fake._stack()
    for index, pushes in ((0, 0), (1, 1)):
        stack[:] = [fake.context_of(index)]
        fake.calls.clear()
        kernel.launch((1,), (128,), 0, 0, params)
        assert fake.names().count("cuCtxPushCurrent_v2") == fake.names().count("cuCtxPopCurrent_v2") == pushes
        assert stack == [fake.context_of(index)] and fake.launches[-1]["context"] == fake.context_of(0)
    fake.fail["cuLaunchKernel"] = 700
    with pytest.raises(driver.DeviceFault):
        kernel.launch((1,), (128,), 0, 0, params)
    assert stack == [fake.context_of(1)]


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (1, "DriverError", "CUDA_ERROR_INVALID_VALUE (1): words for 1"),
        (2, "OutOfMemory", "CUDA_ERROR_OUT_OF_MEMORY (2)"),
        (100, "NoDriver", "CUDA_ERROR_NO_DEVICE"),
        (200, "InvalidImage", "made for a newer NVIDIA driver"),
        (222, "DriverTooOld", "update it"),
        (500, "KernelNotFound", "CUDA_ERROR_NOT_FOUND"),
        (700, "DeviceFault", "ComfyUI has to be restarted"),
        (701, "LaunchRefused", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"),
        (4711, "DriverError", "unknown error (4711)"),
    ],
)
def test_errors_have_names(launched, driver, code, kind, words):
    from svg2_pack.cuda import api

    fake, kernel, params = launched
    fake.fail["cuLaunchKernel"] = code
    with pytest.raises(RuntimeError) as caught:
        kernel.launch((1,), (128,), 0, 0, params)
    assert type(caught.value) is getattr(driver, kind, None) or type(caught.value) is getattr(api, kind)
    assert isinstance(caught.value, driver.DriverError) and words in str(caught.value)
    assert caught.value.code == code and caught.value.function == "cuLaunchKernel"
    assert isinstance(caught.value, torch.OutOfMemoryError) == (code == 2)


def test_out_of_memory_while_loading_is_not_remembered(simulate, driver):
    fake = simulate((9, 0), fail={"cuModuleLoadDataEx": 2})
    with pytest.raises(torch.OutOfMemoryError):
        driver.load(NAME, 0)
    with pytest.raises(torch.OutOfMemoryError):
        driver.why_not(NAME, 0)
    fake.fail.clear()
    assert driver.why_not(NAME, 0) is None


def test_without_a_driver_or_a_gpu(simulate, driver, monkeypatch):
    from svg2_pack.cuda import api

    simulate()
    with pytest.raises(api.NoDriver, match="CUDA_ERROR_NO_DEVICE"):
        driver.load(NAME, 0)
    fake = simulate((8, 0))
    assert "CUDA_ERROR_INVALID_DEVICE" in driver.why_not(NAME, 1)
    del fake.cuModuleLoadDataEx
    driver.forget()
    assert "does not have it" in driver.why_not(NAME, 0)

    def missing(name):
        raise OSError(name + ": cannot open shared object file")

    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(ctypes, "WinDLL", missing, raising=False)
    driver.forget()
    assert "no NVIDIA driver is installed" in driver.why_not(NAME, 0)


def test_what_the_loaded_code_needs(launched):
    assert launched[1].resources() == {"registers": 168, "local": 0, "shared": 128}


def test_importing_calls_nothing():
    """In a fresh interpreter: no driver library is opened, CUDA is not initialised, no other room is imported."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import ctypes, sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch\n"
        "def refused(*a, **k): raise AssertionError(a)\n"
        "ctypes.CDLL = ctypes.WinDLL = refused\n"
        "from cuda import driver, survey\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'svg2_core', 'nodes', 'triton'} & {name.split('.')[0] for name in sys.modules}\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-I", "-c", code, str(root)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
