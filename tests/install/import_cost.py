"""Load the pack as ComfyUI does, in a process that has ComfyUI's own modules; print what that cost and touched, as JSON.

python import_cost.py SCRIPTS COMFYUI PACK
"""

import asyncio
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

scripts, comfyui, pack = sys.argv[1:]
sys.path.insert(0, scripts)
import host  # noqa: E402

host.activate(Path(comfyui))

# What main.py has imported by the time it comes to the custom nodes, and the modules of ComfyUI that it imports with them.
import comfy.ldm.modules.attention  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402, F401
import comfy_api.latest  # noqa: E402, F401
import execution  # noqa: E402, F401
import server  # noqa: E402, F401
import torch  # noqa: E402

import nodes  # noqa: E402, F401

touched = []
EVENTS = ("ctypes.dlopen", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(event, arguments):
    """What ends up in `touched`: programs, connections, libraries, and files opened for writing, but for compiled Python."""
    if event.startswith(EVENTS):
        touched.append(f"{event} {arguments[0]}")
    elif event == "open" and arguments[2] & WRITING and not isinstance(arguments[0], int) and ".pyc" not in str(arguments[0]):
        touched.append(f"open {arguments[0]}")


def watched(name, function):
    def call(*args, **kwargs):
        touched.append(f"torch.cuda.{name}")
        return function(*args, **kwargs)

    return call


def libraries() -> set[str]:
    """The GPU driver's libraries in this process; on Linux alone."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[-1] for line in lines if "libcuda.so" in line or "libnvidia" in line}


async def load():
    spec = importlib.util.spec_from_file_location("svg2", str(Path(pack) / "__init__.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["svg2"] = module
    spec.loader.exec_module(module)
    extension = await module.comfy_entrypoint()
    await extension.on_load()
    return [node.GET_SCHEMA().node_id for node in await extension.get_node_list()]


for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_properties", "get_device_capability"):
    setattr(torch.cuda, name, watched(name, getattr(torch.cuda, name)))
sys.addaudithook(watch)
before, modules = libraries(), set(sys.modules)
cpu, began = time.process_time(), time.perf_counter()
found = asyncio.run(load())
result = {
    "cpu": time.process_time() - cpu,
    "seconds": time.perf_counter() - began,
    "nodes": found,
    "touched": touched,
    "libraries": sorted(libraries() - before),
    "initialized": torch.cuda.is_initialized(),
    "packages": sorted({name.split(".")[0] for name in set(sys.modules) - modules}),
}
print(json.dumps(result))
