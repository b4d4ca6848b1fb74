"""Raylight's own sources in a process on a CPU, for raylight_sources.py: its worker, without Ray and without a GPU.

What is faked: at import, `torch.cuda.is_available()` (xFuser's modules choose their base classes by it); while a worker is made, the
GPU's name and capability, gloo for "nccl" and the CPU for "cuda"; with xFuser 0.5 or later and Raylight 1.5.1, which was written for
0.4: one function that it asks for, and one argument that it does not pass. Dense attention is TORCH_MATH: no other one runs on a CPU.
"""

import contextlib
import inspect
import math
import sys
from pathlib import Path

import torch
import torch.distributed

TESTS = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def faked(thing, **values):
    before = {name: getattr(thing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


def worker_of(rank: int, store: str, folder: str, xfuser: str | None, **degrees):
    """A `RayWorker` of the sources in that folder, one of as many as the degrees' product. store: a file by which they find each other."""
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(Path(folder) / "src"), str(TESTS / "models"), *([xfuser] if xfuser else [])]
    _activate_host()
    import ray  # noqa: F401  before the fake: it looks as well

    with faked(torch.cuda, is_available=lambda: True):
        import raylight  # noqa: F401
    _newer_xfuser()
    from raylight.distributed_worker.ray_worker import RayWorker

    parallel = {
        "global_world_size": math.prod(degrees.values()), "shard_size": math.prod(degrees.values()), "is_xdit": True, "is_fsdp": False, "attention": "TORCH_MATH",
        "sync_ulysses": False, "ulysses_degree": 1, "ring_degree": 1, "cfg_degree": 1, "dp_degree": 1, "pp_degree": 1,
        "use_group_process_group": False, "use_mmap": False, **degrees,
    }  # fmt: skip
    group, mesh = torch.distributed.init_process_group, torch.distributed.device_mesh.init_device_mesh
    gpu = {"get_device_capability": lambda *_: (8, 0), "get_device_name": lambda *_: "cpu", "set_device": lambda *_: None}

    def gloo(backend, *, init_method, **named):
        return group("gloo", init_method=f"file://{store}", **named)

    with (
        faked(torch.cuda, **gpu),
        faked(torch.distributed, init_process_group=gloo),
        faked(torch.distributed.device_mesh, init_device_mesh=lambda _, **named: mesh("cpu", **named)),
        contextlib.redirect_stdout(None),
    ):
        return RayWorker(local_rank=rank, device_id=0, parallel_dict=parallel)


def _activate_host() -> None:
    sys.path.insert(0, str(TESTS.parent / "scripts"))
    import host

    sys.modules["svg2_host_script"] = host
    host.activate(host.find(), cpu=True)


def _newer_xfuser() -> None:
    asked = sys.modules["xfuser.envs"]
    if not hasattr(asked, "get_device_name"):
        asked.get_device_name = lambda: "cpu"
    generator = sys.modules["xfuser.core.distributed.utils"].RankGenerator
    if "fs" in inspect.signature(generator.__init__).parameters:
        groups = sys.modules.get("raylight.distributed_worker.parallel_group_manager")
        if groups is None:
            import raylight.distributed_worker.parallel_group_manager as groups
        groups.RankGenerator = lambda *values: generator(*values[:5], 1, values[5])


def version() -> str:
    """What Raylight's sources call themselves."""
    import raylight

    project = Path(raylight.__file__).parents[2] / "pyproject.toml"
    found = [line for line in project.read_text(encoding="utf-8").splitlines() if line.startswith("version")]
    return found[0].split('"')[1] if found else "?"

