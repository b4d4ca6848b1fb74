"""What is compiled: the table of kernel sources, their compiler options, and the fingerprint of what goes into a file.

Standard library only: the build, the driver and install.py read it alike.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

# device-as-default: everything is device code unless marked, as in a source without toolkit headers.
# no-source-include: the current folder is not searched, so that nothing but `read` decides what is included.
OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--no-source-include")


@dataclass(frozen=True)
class Source:
    """One .cu file. sass: architectures built as machine code ("90a": for 9.0 alone); ptx: one as PTX, or None."""

    name: str
    file: str
    sass: tuple[str, ...]
    ptx: str | None = None
    options: tuple[str, ...] = ()

    def is_for(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU is to have these kernels: with PTX every one, without it only those that `sass` names."""
        return self.ptx is not None or "{}{}a".format(*capability) in self.sass


SOURCES = (
    Source("near_field_fa2", "near_field_fa2.cu", sass=("80", "86", "89", "90", "100", "120"), ptx="80"),
    # Its instructions exist on 9.0 and nowhere else, not even later: no PTX, nothing for another GPU to fall back on.
    Source("near_field_fa3", "near_field_fa3.cu", sass=("90a",)),
)


def find(name: str) -> Source:
    """The entry of the table called `name`; ValueError if there is none."""
    for source in SOURCES:
        if source.name == name:
            return source
    raise ValueError(f"cuda: no kernel source is called {name!r}; there are {', '.join(s.name for s in SOURCES)}")


def options(source: Source, target: str) -> list[str]:
    """Compiler options for `target`: "sm_90" for machine code, "compute_80" for PTX."""
    return [*OPTIONS, *source.options, f"--gpu-architecture={target}"]


def read(source: Source, folder: Path = HERE) -> tuple[str, dict[str, str]]:
    """The text of the .cu file, and of every file of this folder that it includes, directly or not, by include name.

    Raises OSError where the .cu file is missing. An include that is not in the folder is left to the compiler: it may
    stand in a branch that is not taken.
    """
    text = _text(folder / source.file)
    headers: dict[str, str] = {}
    todo = [text]
    while todo:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', todo.pop(), re.MULTILINE):
            if name not in headers and (folder / name).is_file():
                headers[name] = _text(folder / name)
                todo.append(headers[name])
    return text, dict(sorted(headers.items()))


def fingerprint(source: Source, target: str, compiler: str, folder: Path = HERE) -> str:
    """sha256 of all that decides the compiled file: texts, options and the compiler's version. Raises OSError."""
    text, headers = read(source, folder)
    everything = [source.file, text, headers, options(source, target), compiler]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def _text(path: Path) -> str:
    # Text mode makes one newline of all kinds: a checkout on Windows gives the same fingerprint.
    return path.read_text(encoding="utf-8")
