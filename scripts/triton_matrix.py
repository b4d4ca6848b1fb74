"""Compile the Triton kernels with every version of Triton that they are for: `python scripts/triton_matrix.py [3.3.1 3.6.0]`.

Each version gets a folder of its own below .cache/, put before .venv's. The table goes into tests/kernels/TRITON.md. No GPU is
needed; an hour on one core. The suite itself compiles with the newest for two architectures, and with the oldest for one.
"""

import json
import os
import subprocess
import sys
from datetime import date

import environment
import host

VERSIONS = ("3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TABLE = host.ROOT / "tests/kernels/TRITON.md"


def oldest() -> str:
    """The oldest version that the kernels are for, and that there is for this Python."""
    return VERSIONS[0] if sys.version_info < (3, 14) else "3.5.1"


def folder(version: str) -> str:
    """Where a version lies, fetched if need be."""
    where = host.CACHE / f"triton-{version}"
    if not (where / "triton").exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", str(where), f"triton=={version}"], check=True)
    return str(where)


def compiled(version: str, arch: int) -> list[dict] | str:
    """What compile_ahead.py reports of all kernels, or how it failed."""
    surroundings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": folder(version)}
    command = [sys.executable, str(host.ROOT / "tests/kernels/compile_ahead.py"), str(arch), "--all"]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["killed"])[-1][:120]
    return [json.loads(line) for line in done.stdout.splitlines()]


def cell(rows: list[dict] | str) -> str:
    """For the table: how many variants compiled, and which of them spill."""
    if isinstance(rows, str):
        return f"fails: {rows}"
    spilled = {row["kernel"].removesuffix("_kernel"): row["stack"] + row["local"] for row in rows if row["stack"] or row["local"]}
    return f"{len(rows)}" + (": " + ", ".join(f"{name} {size} B" for name, size in spilled.items()) if spilled else "")


def main() -> None:
    environment.ensure()
    lines = [
        "# Versions of Triton", "",
        f"`python scripts/triton_matrix.py`, {date.today()}: compiled variants of all kernels (five calls for sm_86, two for the others; their head",
        "dimensions and types are in compile_ahead.py), and those whose registers spill, with the bytes. Nothing here has run on a GPU.", "",
        "| Triton | " + " | ".join(f"sm_{arch}" for arch in ARCHITECTURES) + " |", "| --- " * (len(ARCHITECTURES) + 1) + "|",
    ]  # fmt: skip
    for version in sys.argv[1:] or VERSIONS:
        cells = [cell(compiled(version, arch)) for arch in ARCHITECTURES]
        lines.append(f"| {version} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
