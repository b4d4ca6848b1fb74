"""Read compiled files: which kernels a cubin (ELF) or a PTX text holds, and what their code needs of the hardware.

Standard library only. Attribute numbers of `.nv.info` are as NVIDIA's cuobjdump prints them.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_REGISTERS, _FRAME_SIZE, _PARAMETER_BYTES = 0x2F, 0x11, 0x19
_HALFWORD, _SIZED = 3, 4  # how an attribute's value is stored
_NO_BYTES = 8  # type of a section that has no bytes in the file


class FormatError(ValueError):
    """The file is no cubin or PTX, or is cut short."""


@dataclass(frozen=True)
class Kernel:
    """parameters: bytes of all parameters. registers per thread and local: bytes of stack per thread; 0 in PTX."""

    parameters: int
    registers: int = 0
    local: int = 0


def kernels(image: bytes) -> dict[str, Kernel]:
    """The kernels of a compiled file by name. Raises FormatError."""
    if image.startswith(b"\x7fELF"):
        try:
            return _of_cubin(image)
        except (struct.error, LookupError, ValueError, OverflowError) as error:
            raise FormatError(f"the cubin is damaged: {error}") from error
    if b".version" in image and b".entry" in image:
        return _of_ptx(image.decode(errors="replace"))
    raise FormatError("it is neither a cubin nor PTX")


def _of_cubin(image: bytes) -> dict[str, Kernel]:
    if image[4:6] != b"\x02\x01":
        raise FormatError("the cubin is not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry_bytes, count, names_at = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, table + i * entry_bytes) for i in range(count)]
    sections = {}
    for name, kind, _, _, offset, size, *_ in headers:
        if kind != _NO_BYTES and offset + size > len(image):
            raise FormatError("the cubin is cut short")
        sections[_string(image, headers[names_at][4] + name)] = (offset, size)

    registers, local = {}, {}
    for attribute, value in _attributes(image, *sections.get(".nv.info", (0, 0))):
        if attribute in (_REGISTERS, _FRAME_SIZE):
            symbol, number = struct.unpack("<II", value)
            name = _symbol(image, sections, symbol)
            (registers if attribute == _REGISTERS else local)[name] = number
    found = {}
    for section, place in sections.items():
        name = section.removeprefix(".nv.info.")
        if name != section:
            values = dict(_attributes(image, *place))
            if _PARAMETER_BYTES in values:  # a function that is not a kernel has none
                (parameters,) = struct.unpack("<H", values[_PARAMETER_BYTES])
                found[name] = Kernel(parameters, registers[name], local[name])
    return found


def _attributes(image: bytes, offset: int, size: int):
    end = offset + size
    while offset < end:
        storage, attribute, value = struct.unpack_from("<BBH", image, offset)
        offset += 4
        if storage == _SIZED:
            yield attribute, image[offset : offset + value]
            offset += value
        elif storage == _HALFWORD:
            yield attribute, struct.pack("<H", value)


def _symbol(image: bytes, sections: dict, index: int) -> str:
    # By the sections' names: the link from .nv.info to its symbols is wrong in files of CUDA 12.1.
    (name,) = struct.unpack_from("<I", image, sections[".symtab"][0] + 24 * index)
    return _string(image, sections[".strtab"][0] + name)


def _string(image: bytes, offset: int) -> str:
    return image[offset : image.index(b"\0", offset)].decode()


def _of_ptx(text: str) -> dict[str, Kernel]:
    found = {}
    for name, parameters in re.findall(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)", text):
        size = 0
        for align, bits, bracket in re.findall(
            r"\.param(?:\s+\.align\s+(\d+))?\s+\.[busf](\d+)\s+[\w$]+(?:\[(\d+)\])?", parameters
        ):
            item = int(bits) // 8
            align = int(align or item)
            size = -(-size // align) * align + item * int(bracket or 1)
        found[name] = Kernel(size)
    return found
