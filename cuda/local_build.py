"""The last step before Triton: the same sources, compiled on the user's machine by the NVRTC that torch brings along.

Importing this does not import torch: install.py asks it what it would find.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import cache, sources
from .images import capability_of
from .nvrtc import CompileError, Compiler


def build(name: str, capability: tuple[int, int]) -> bytes:
    """Kernel source `name` compiled for a GPU of this capability, from the cache where it is there already.

    Takes up to a minute the first time. Raises CompileError where torch has no compiler, or it refuses the source.
    """
    import torch

    if torch.version.cuda is None:
        raise CompileError("this torch is not a CUDA build and has no compiler with it")
    compiler = _first_that_loads(libraries(Path(torch.__file__).parent, torch.version.cuda))
    source = sources.find(name)
    target = target_for(source, capability, compiler.architectures())
    try:
        key = sources.fingerprint(source, target, ".".join(map(str, compiler.version)))
        data = cache.load(key)
        if data is None:
            data, _ = compiler.compile(source.file, *sources.read(source), sources.options(source, target))
            cache.store(key, data)
    except OSError as error:
        raise CompileError(f"the kernel sources cannot be read: {error}") from error
    return data


def target_for(source: sources.Source, capability: tuple[int, int], architectures: list[int]) -> str:
    """What to compile for: machine code ("sm_89") where the compiler knows the GPU, else PTX of the nearest older one.

    architectures: what the compiler knows, as 89 for 8.9. Raises CompileError where neither is possible.
    """
    number = capability[0] * 10 + capability[1]
    if f"{number}a" in source.sass and number in architectures:
        return f"sm_{number}a"
    if source.ptx is None or capability < capability_of(source.ptx):
        raise CompileError(f"{source.file} is not made for compute capability {capability[0]}.{capability[1]}")
    if number in architectures:
        return f"sm_{number}"
    known = [a for a in architectures if capability_of(source.ptx) <= divmod(a, 10) <= capability]
    if not known:
        raise CompileError(
            f"torch's compiler knows nothing older than compute capability {capability[0]}.{capability[1]}"
        )
    return f"compute_{max(known)}"


def libraries(torch_folder: Path, cuda: str) -> list[Path | str]:
    """Where the NVRTC of torch's CUDA version ("12.8") may be: files that exist, then a name for the system to find.

    Another major version than torch's might make code that the user's driver does not take.
    """
    major = cuda.split(".")[0]
    if os.name == "nt":
        in_torch, in_nvidia, in_prefix = f"nvrtc64_{major}*_0.dll", f"*/bin/**/nvrtc64_{major}*_0.dll", "Library/bin"
    else:
        in_torch, in_nvidia, in_prefix = f"libnvrtc*.so.{major}*", f"*/lib/libnvrtc.so.{major}*", "lib"
    found = [*torch_folder.glob(f"lib/{in_torch}")]
    for folder in dict.fromkeys([torch_folder.parent, *(Path(entry) for entry in sys.path if entry)]):
        found += (folder / "nvidia").glob(in_nvidia)  # NVIDIA's packages, which torch's wheels depend on
    found += Path(sys.prefix, in_prefix).glob(in_torch)  # conda
    found = [path for path in found if not {"builtins", "alt"} & set(path.name.replace("-", ".").split("."))]
    return [*dict.fromkeys(found), *([] if os.name == "nt" else [f"libnvrtc.so.{major}"])]


def _first_that_loads(candidates: list[Path | str]) -> Compiler:
    reasons = []
    for library in candidates:
        try:
            return Compiler(library)
        except CompileError as error:
            reasons.append(str(error))
    raise CompileError("torch's compiler was not found: " + ("; ".join(reasons) or "no NVRTC library is beside torch"))
