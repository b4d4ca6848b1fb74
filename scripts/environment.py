"""The scripts' own set-up: make `.venv/` in the checkout, install what ComfyUI and the tests need, run inside it.

The first call takes a minute or more; later calls compare one stamp and go on at once. Standard library only.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import host
from host import ROOT, SetupError

VENV = ROOT / ".venv"
# Its content: the stamp of a finished installation, or UNFINISHED. A .venv without this file is not ours to touch.
STAMP = VENV / "svg2-stamp.txt"
UNFINISHED = "unfinished"
LOG = ROOT / ".cache" / "setup.log"

# These three go together: torchvision and torch must match exactly.
TORCH, TORCHVISION, TORCHAUDIO = "torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0"
TRITON = "triton==3.7.1"  # without a GPU, for its interpreter and its compiler
TRITON_WINDOWS = "triton-windows>=3.7,<3.8"  # of the same minor version: others are for other releases of torch
CUDA = "cu130"
TORCH_INDEX = "https://download.pytorch.org/whl/"
# pytest 9.2 has no Node._nodeid any more, and pytest-xdist up to 3.8 then forgets its groups without a word.
TOOLS = ["pytest>=8,<9.2", "pytest-xdist>=3.6,<4", "ruff>=0.12,<1", "matplotlib>=3.8,<4", "scikit-image>=0.22,<1", "playwright>=1.49,<2"]
# The engines of several GPUs that the tests run SVG2 under; 240 MB.
if sys.platform == "linux":
    TOOLS += ["ray>=2.50,<3", "yunchang==0.6.4"]
# The tests run the CUDA kernels on a CPU, compiled for it.
if not any(map(shutil.which, ("c++", "g++", "clang++"))):
    TOOLS.append("ziglang>=0.14,<0.18")

_began = time.monotonic()


def ensure(comfyui: str | None = None) -> Path:
    """Set up what is missing, then return ComfyUI's folder inside `.venv`: outside it, the calling script starts over in there.

    Raises SetupError with a sentence for the user when that cannot be done.
    """
    if sys.version_info < (3, 10):  # noqa: UP036
        raise SetupError(f"Python {platform.python_version()} is too old: run this with Python 3.10 or newer.")
    if not _ours():
        raise SetupError(f"{VENV} was not made by this script: move it away or delete it, then run this again.")
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    inside = Path(sys.prefix).resolve() == VENV.resolve()
    if not inside and (_stamp() in ("", UNFINISHED) or not python.exists()):
        _make_venv()
    comfyui_path = host.find(comfyui, python=str(python))
    wanted = _wanted_stamp(comfyui_path)
    if _stamp() != wanted:
        STAMP.write_text(UNFINISHED)
        _install(python, comfyui_path)
        STAMP.write_text(wanted)
        _say("set-up finished")
    # Threads that wait for work sleep: spinning, as is the default, makes small operations on a busy machine 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not inside:
        _start_over(python)
    return comfyui_path


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA driver and a device are there; asks neither to do anything."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return os.name == "nt" or bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/dxg")


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _ours() -> bool:
    return not VENV.exists() or STAMP.exists()


def _stamp() -> str:
    return STAMP.read_text() if STAMP.exists() else ""


def _wanted_stamp(comfyui: Path) -> str:
    parts = [TORCH, TORCHVISION, TORCHAUDIO, TRITON, *TOOLS, *_host_requirements(comfyui), str(has_nvidia_gpu()), str(VENV)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _host_requirements(comfyui: Path) -> list[str]:
    """ComfyUI's own requirements, less the three this file chooses the builds of."""
    lines = [
        line.split("#")[0].strip() for line in (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line and not re.match(r"torch(vision|audio)?\b", line)]


def _make_venv() -> None:
    # An installation that was interrupted may have left half a package behind: start afresh.
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir(exist_ok=True)
    STAMP.write_text(UNFINISHED)
    gigabytes = 12 if has_nvidia_gpu() else 3
    if shutil.disk_usage(VENV).free < gigabytes * 1e9:
        raise SetupError(
            f"The disk is nearly full: the installation needs {gigabytes} GB on the disk of {ROOT}; free some space and run this again."
        )
    if not _run("making .venv", [sys.executable, "-m", "venv", str(VENV)]):
        raise SetupError(
            f"Python's venv module does not work ({LOG} says why): install it (Debian, Ubuntu: apt install python3-venv) and run this again."
        )


def _install(python: Path, comfyui: Path) -> None:
    # torchvision goes in before the packages that depend on it: pip would otherwise choose one, and another torch with it.
    done = _install_torch(python)
    triton = [TRITON] if sys.platform == "linux" and not has_nvidia_gpu() else []
    rest = [*_host_requirements(comfyui), *TOOLS, *triton]
    if not (done and _pip(python, "installing ComfyUI's requirements", *rest)):
        cause = _why()
        if cause is None:
            raise SetupError(
                f"The installation stopped because pip failed: {LOG} says why; run this again to try again."
            )
        raise SetupError(f"The installation stopped: {cause}, then run this again (log: {LOG}).")


def _install_torch(python: Path) -> bool:
    if has_nvidia_gpu() and os.name == "nt":
        # The package index has CUDA builds for Linux only; for Windows they are on torch's own.
        wheels = [f"{wheel}+{CUDA}" for wheel in (TORCH, TORCHVISION, TORCHAUDIO)]
        index = ["--extra-index-url", TORCH_INDEX + CUDA]
        return (
            _pip(python, f"installing {TORCH} for CUDA (several GB)", *index, wheels[0], TRITON_WINDOWS)
            and _pip(python, "installing torchvision and torchaudio", *index, "--no-deps", *wheels[1:])
        )  # fmt: skip
    if has_nvidia_gpu():
        done = _pip(python, f"installing {TORCH} for CUDA (several GB)", TORCH, "triton")
    elif sys.platform == "darwin":
        done = _pip(python, f"installing {TORCH}", TORCH)
    else:
        # Asking for the CPU build by name keeps gigabytes of CUDA packages away. Where no configured package index has it,
        # torch's own does.
        title, wheel = f"installing {TORCH} for the CPU", TORCH + "+cpu"
        done = _pip(python, title, wheel)
        if not done and _why() is None:
            done = _pip(python, title + ", from its own index", "--extra-index-url", TORCH_INDEX + "cpu", wheel)
    return done and _pip(python, "installing torchvision and torchaudio", "--no-deps", TORCHVISION, TORCHAUDIO)


def _pip(python: Path, title: str, *arguments: str) -> bool:
    options = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile", "--retries", "2"]
    return _run(title, [str(python), *options, *arguments])


def _why() -> str | None:
    return host.explain_pip(LOG.read_text(encoding="utf-8", errors="replace"))


def _run(title: str, command: list[str]) -> bool:
    """Run a command, its output going to the log, with a line now and then; whether it succeeded."""
    _say(title)
    LOG.parent.mkdir(exist_ok=True)
    # Only the latest command's output is kept: that of the one that failed, if one did.
    with open(LOG, "wb") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            while True:
                try:
                    return process.wait(timeout=20) == 0
                except subprocess.TimeoutExpired:
                    _say("  still " + title)
        except KeyboardInterrupt:
            process.terminate()
            raise


def _say(text: str) -> None:
    print(f"[{time.monotonic() - _began:4.0f} s] {text}", file=sys.stderr, flush=True)


def _start_over(python: Path) -> None:
    command = [str(python), *sys.argv]
    if os.name == "nt":  # there, execv returns to the caller's shell at once
        sys.exit(subprocess.call(command))
    sys.stdout.flush()
    os.execv(python, command)
