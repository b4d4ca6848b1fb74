"""Run by ComfyUI-Manager after installing requirements.txt: says what SVG2 found. Installs, downloads and changes nothing.

The pack works without this having run. Output is ASCII, and the exit code 0, whatever is found.
"""

import ctypes
import os
from importlib import metadata


def version(*names):
    """Version of the first of these packages that is installed, or None."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def has_nvidia_driver():
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def main():
    torch, triton = version("torch"), version("triton", "triton-windows")
    print("[SVG2] torch: " + (torch or "not found; ComfyUI itself needs it"))
    print("[SVG2] triton: " + (triton or "not found; the Triton kernels cannot be used"))
    print("[SVG2] NVIDIA driver: " + ("found" if has_nvidia_driver() else "not found; SVG2 is slow on other devices"))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # an information page must not fail an installation
        print("[SVG2] check skipped: " + ascii(error))
