"""What this machine has, and which kernels will run on it, found without loading any: for install.py and the Doctor.

Standard library only, torch is looked at but not imported. Texts are ASCII but for a GPU's name. A forecast: whether a
file really loads is known when it is loaded, and a kernel serves nobody before it passed its self-test.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

from . import images, local_build, nvrtc, triton_advice
from .api import Driver, DriverError
from .sources import SOURCES, Source

# The first NVIDIA driver that knows a CUDA version, for people.
_RELEASES = {(12, 0): "525", (12, 8): "570"}


def survey(load_driver=Driver.load) -> dict:
    """All findings as plain JSON types; `lines` says them. load_driver: replaced in tests."""
    found = {"python": platform.python_version(), "system": platform.system(), "torch": _torch(), "triton": _triton()}
    found["intact"], found["damaged"] = _check_prebuilt()
    found["driver"], found["gpus"], found["no_gpu"] = _gpus(load_driver)
    for gpu in found["gpus"]:
        made = [source for source in SOURCES if source.is_for(tuple(gpu["capability"]))]
        gpu["kernels"] = {source.name: _forecast(source, gpu, found) for source in made}
    found["advice"] = _advice(found)
    return found


def lines(found: dict) -> list[str]:
    """The findings in sentences, one per line."""
    torch = found["torch"]
    built = f"for CUDA {torch['cuda']}" if torch["cuda"] else "not a CUDA build"
    result = [
        f"torch: {torch['version']}, {built}" if torch["version"] else "torch: not installed; ComfyUI itself needs it",
        f"triton: {found['triton'] or 'not installed'}",
        f"prebuilt CUDA kernels: {found['intact']} files intact",
        *(f"prebuilt CUDA kernels: {sentence}" for sentence in found["damaged"]),
    ]
    if found["no_gpu"]:
        result.append(f"GPU: none that SVG2 can use: {found['no_gpu']}")
        result.append("will run: torch's own attention (backend sdpa) where ComfyUI runs on the CPU; on other GPUs attention stays dense")
    else:
        result.append("NVIDIA driver: knows CUDA {}.{}".format(*found["driver"]))
    for gpu in found["gpus"]:
        result.append("GPU {index}: {name}, compute capability {capability[0]}.{capability[1]}".format(**gpu))
        for name, kernels in gpu["kernels"].items():
            result.append(f"  {name} can run as: {kernels['runs']}")
            result += [f"    not better because: {reason}" for reason in kernels["reasons"]]
    result += [f"to get faster: {advice}" for advice in found["advice"]]
    return result


def _gpus(load_driver) -> tuple[list[int] | None, list[dict], str | None]:
    """(CUDA version the driver knows, GPUs, why there are none)."""
    try:
        driver = load_driver()
        driver("cuInit", 0)
        gpus = [_gpu(driver, index) for index in range(driver.number("cuDeviceGetCount"))]
        return list(driver.version()), gpus, None if gpus else "the NVIDIA driver sees no GPU"
    except DriverError as error:
        return None, [], error.detail


def _gpu(driver: Driver, index: int) -> dict:
    import ctypes

    device, name = driver.number("cuDeviceGet", index), ctypes.create_string_buffer(256)
    driver("cuDeviceGetName", name, len(name), device)
    text = name.value.decode(errors="replace")
    return {"index": index, "name": text, "capability": list(driver.capability(device))}


def _torch() -> dict:
    found = {"version": _version("torch"), "cuda": None, "folder": None}
    spec = importlib.util.find_spec("torch")  # of a top-level name: finds it without running it
    if spec is not None and spec.origin:
        folder = Path(spec.origin).parent
        found["folder"] = str(folder)
        try:
            text = (folder / "version.py").read_text(encoding="utf-8")
        except OSError:
            return found
        cuda = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
        found["cuda"] = cuda.group(1) if cuda else None
    return found


def _triton() -> str | None:
    """By its source: it is one import package, but each kind of torch brings it in a distribution of another name."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.origin:
        return None
    try:
        text = Path(spec.origin).read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^__version__ = ['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found.group(1) if found else "of unknown version"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_prebuilt() -> tuple[int, list[str]]:
    """(number of intact files, a sentence for each other one). Every one is read and its sha256 compared."""
    try:
        listed = images.all_images()
    except images.ImageError as error:
        return 0, [str(error)]
    damaged = []
    for image in listed:
        try:
            images.read(image)
        except images.ImageError as error:
            damaged.append(str(error))
    return len(listed) - len(damaged), damaged


def _forecast(source: Source, gpu: dict, found: dict) -> dict:
    """{"runs": what, "kind": sass, ptx, nvrtc, triton or torch, "reasons": why nothing before it}."""
    capability = tuple(gpu["capability"])
    if capability < (8, 0):
        return {"runs": "dense attention", "kind": "torch", "reasons": ["the kernels need compute capability 8.0"]}
    fitting, reasons = images.usable(source.name, capability, tuple(found["driver"]))
    for image in fitting:
        try:
            images.read(image)
        except images.ImageError as error:
            reasons.append(str(error))
            continue
        first = " (the driver compiles it at its first use)" if image.kind == "ptx" else ""
        return {"runs": f"{image}{first}", "kind": image.kind, "reasons": reasons}
    reason = _no_local_build(source, capability, found["torch"])
    if reason is None:
        runs = "compiled by torch's NVRTC at its first use"
        return {"runs": runs, "kind": "nvrtc", "reasons": reasons}
    reasons.append(reason)
    if found["triton"] and found["torch"]["cuda"]:
        return {"runs": "Triton kernels", "kind": "triton", "reasons": reasons}
    reasons.append("Triton is not installed" if not found["triton"] else "torch is not a CUDA build")
    return {"runs": "dense attention", "kind": "torch", "reasons": reasons}


def _no_local_build(source: Source, capability: tuple[int, int], torch: dict) -> str | None:
    """Why torch's NVRTC cannot make the kernels, or None. Its library is looked for, not loaded."""
    if not torch["cuda"]:
        return "torch is not a CUDA build and brings no compiler"
    if not any(isinstance(library, Path) for library in local_build.libraries(Path(torch["folder"]), torch["cuda"])):
        return f"no NVRTC of CUDA {torch['cuda']} was found beside torch"
    try:
        local_build.target_for(source, capability, [capability[0] * 10 + capability[1]])
    except nvrtc.CompileError as error:
        return str(error)
    return None


def _advice(found: dict) -> list[str]:
    advice = []
    if found["damaged"]:
        advice.append("install this pack again: some of its prebuilt files are missing or damaged")
    if not found["gpus"]:
        return [*advice, "SVG2 needs an NVIDIA GPU of compute capability 8.0 (RTX 30 series, A100) or newer"]
    if not found["torch"]["cuda"]:
        advice.append("install a CUDA build of torch: this one cannot use the GPU")
    elif not found["triton"]:
        advice.append(f"{triton_advice.how_to_get(found['torch']['version'])}: clustering and the block map run on Triton")
    if found["triton"] and platform.system() == "Linux" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        advice.append("install a C compiler (Debian, Ubuntu: apt install gcc python3-dev): Triton needs one at its first use")
    needed = max(_newer_driver(gpu, found) for gpu in found["gpus"])
    if needed:
        release = f" ({_RELEASES[needed]} or newer)" if needed in _RELEASES else ""
        advice.append("update the NVIDIA driver to one that knows CUDA {}.{}".format(*needed) + release)
    return advice


def _newer_driver(gpu: dict, found: dict) -> tuple[int, ...]:
    """The CUDA version that the driver would have to know for the best file for this GPU; () if it does."""
    name, capability = SOURCES[0].name, tuple(gpu["capability"])
    best = images.usable(name, capability, (99, 0))[0][:1]
    return next((images.driver_needed(i) for i in best if images.driver_needed(i) > tuple(found["driver"])), ())
