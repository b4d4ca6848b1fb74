"""Kernels compiled on this machine, kept in the user's cache folder. Standard library only.

Linux: $XDG_CACHE_HOME or ~/.cache; Windows: %LOCALAPPDATA%; in it svg2-sparse-attention/kernels. It may be deleted at
any time. A file is one line, "svg2 <key> <sha256 of the rest>", and the compiled kernels. It appears by a rename, so
nobody reads half of one; a damaged one is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """Where the files are. Raises RuntimeError where the user has no home folder."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    # A relative path is not allowed in XDG_CACHE_HOME and to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "svg2-sparse-attention" / "kernels"


def load(key: str) -> bytes | None:
    """What was stored under `key` (a hash of all that decides the content), or None: missing, damaged or unreadable."""
    try:
        header, _, data = (folder() / key).read_bytes().partition(b"\n")
    except (OSError, RuntimeError):
        return None
    return data if header == _header(key, data) else None


def store(key: str, data: bytes) -> bool:
    """Keep `data`; False where that is not possible: the cache is a convenience."""
    temporary = None
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder(), prefix="unfinished-", delete=False) as file:
            temporary = file.name
            file.write(_header(key, data) + b"\n" + data)
        os.replace(temporary, folder() / key)
    except (OSError, RuntimeError):  # full, read-only, or on Windows open in another process
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return False
    return True


def _header(key: str, data: bytes) -> bytes:
    return f"svg2 {key} {hashlib.sha256(data).hexdigest()}".encode()
