"""The prebuilt files: which of them fit a GPU, and their bytes if their sha256 is right. Standard library only."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

PREBUILT = Path(__file__).resolve().parent / "prebuilt"
MANIFEST = "manifest.json"

# NVIDIA promises nothing for machine code of desktop GPUs on its system-on-chips (Orin 8.7, Thor 10.1 and 11.0), though
# the numbers would fit (CUDA programming guide, binary compatibility). They take PTX.
SYSTEMS_ON_CHIP = {(8, 7), (10, 1), (11, 0)}


class ImageError(Exception):
    """A prebuilt file, or the manifest, cannot be used: one sentence saying which and why."""


@dataclass(frozen=True)
class Image:
    """One prebuilt file as the manifest has it. kind: "sass" or "ptx"; arch: "80", "90a"; toolkit: (major, minor)."""

    path: Path
    name: str
    kind: str
    arch: str
    sha256: str
    toolkit: tuple[int, int]

    def __str__(self) -> str:
        return f"prebuilt {'sm' if self.kind == 'sass' else 'PTX compute'}_{self.arch}"


def all_images() -> list[Image]:
    """What the manifest in PREBUILT lists. Raises ImageError where it is missing or damaged."""
    try:
        entries = json.loads((PREBUILT / MANIFEST).read_text(encoding="utf-8"))["files"]
        return [_image(entry) for entry in entries]
    except FileNotFoundError:
        raise ImageError(f"the list of prebuilt files, {MANIFEST}, is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(
            f"the list of prebuilt files, {MANIFEST}, is damaged ({type(error).__name__}: {error})"
        ) from error


def _image(entry: dict) -> Image:
    if re.fullmatch(r"\w+(\.\w+)+", entry["file"]) is None:
        raise ValueError(f"{entry['file']!r} is no plain file name")
    if entry["kind"] not in ("sass", "ptx") or re.fullmatch(r"\d{2,3}a?", entry["arch"]) is None:
        raise ValueError(f"{entry['file']} has an unknown kind or architecture")
    if re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) is None:
        raise ValueError(f"{entry['file']} has no sha256")
    major, minor, *_ = (int(part) for part in entry["toolkit"].split("."))
    return Image(PREBUILT / entry["file"], entry["name"], entry["kind"], entry["arch"], entry["sha256"], (major, minor))


def capability_of(arch: str) -> tuple[int, int]:
    """(major, minor) of an architecture's number: "86" is 8.6, "120" is 12.0, "90a" is 9.0."""
    digits = arch.rstrip("a")
    return int(digits[:-1]), int(digits[-1])


def fits(image: Image, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability can run the file.

    Machine code runs on its own major version, from the minor version it was built for; with an "a", on that one alone.
    PTX is compiled by the driver for any capability from its own upwards; with an "a", likewise for that one alone.
    """
    built = capability_of(image.arch)
    if image.arch.endswith("a"):
        return capability == built
    if image.kind == "ptx":
        return capability >= built
    return capability[0] == built[0] and capability >= built and capability not in SYSTEMS_ON_CHIP


def driver_needed(image: Image) -> tuple[int, int]:
    """The CUDA version that a driver must know to take the file.

    Machine code goes with every driver of its toolkit's major version (CUDA compatibility guide, minor version
    compatibility); for PTX the driver's own compiler must be as new as the one that wrote it.
    """
    return (image.toolkit[0], 0) if image.kind == "sass" else image.toolkit


def usable(name: str, capability: tuple[int, int], driver: tuple[int, int]) -> tuple[list[Image], list[str]]:
    """(files of kernel source `name` worth trying, best first; sentences about what is better but out of reach).

    Machine code nearest to the GPU comes first, then PTX. driver: the CUDA version that the GPU's driver knows.
    """
    try:
        fitting = [image for image in all_images() if image.name == name and fits(image, capability)]
    except ImageError as error:
        return [], [str(error)]
    fitting.sort(key=lambda i: (i.kind == "sass", i.arch.endswith("a"), capability_of(i.arch)), reverse=True)
    reasons = []
    if not any(image.kind == "sass" for image in fitting):
        reasons.append("no prebuilt machine code is for compute capability {}.{}".format(*capability))
    for image in fitting:
        if driver < driver_needed(image):
            needed = "{}.{}".format(*driver_needed(image))
            reasons.append(
                f"{image} needs an NVIDIA driver that knows CUDA {needed}, this one knows {driver[0]}.{driver[1]}"
            )
    return [image for image in fitting if driver >= driver_needed(image)], reasons


def read(image: Image) -> bytes:
    """The file's bytes, exactly those that the manifest was made from. Raises ImageError."""
    try:
        data = image.path.read_bytes()
    except OSError as error:
        raise ImageError(f"{image.path.name} cannot be read ({type(error).__name__})") from error
    if image.kind == "ptx":
        data = data.replace(b"\r\n", b"\n")  # git on Windows may have changed the line ends of what is text
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise ImageError(f"{image.path.name} is damaged or foreign: its sha256 is not the one in {MANIFEST}")
    return data
