"""Build the prebuilt kernels: `python cuda/build.py`; or see whether they are what the sources give: `... --check`.

Every file of the table in sources.py, compiled by one pinned NVRTC from the Python package index, goes to prebuilt/
with manifest.json. The same sources give the same bytes on every machine. --check compiles to memory and compares; it
fails too where a kernel spills registers. Exit code 0: done; 1: the check failed; 2: the compiler could not be set up
or refused.

Needs Linux on x86-64, Python 3.10 and pip; the first run fetches 88 MB into .cache/nvrtc-venv. No GPU, no CUDA toolkit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __package__:
    from . import image_format, images, nvrtc, sources
else:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cuda import image_format, images, nvrtc, sources

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".cache" / "nvrtc-venv"
STAMP = VENV / "svg2-stamp.txt"
TOOLKIT = "12.8.93"
WHEEL = (
    f"nvidia-cuda-nvrtc-cu12=={TOOLKIT} --hash=sha256:a7756528852ef889772a84c6cd89d41dfa74667e24cca16bb31f8f061e3e9994"
)
LIBRARY = "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
LIMIT = 12 << 20  # bytes of all prebuilt files together
# The assembler's own report of registers, stack and spills. It goes into some files' notes, so it counts as an input.
REPORT = "--ptxas-options=-v"


class BuildError(Exception):
    """One sentence for the developer: what is wrong and what to do about it."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare prebuilt/ with what the sources give; write nothing"
    )
    check = parser.parse_args(arguments).check
    try:
        problems = stale() if check else []
        if not problems:  # else the answer is known without compiling
            built = compile_all(compiler_library())
            problems = compare(built) if check else []
            problems += resource_problems(built)
            if not check:
                write(built)
    except (BuildError, nvrtc.CompileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(("error: " if check else "warning: ") + problem, file=sys.stderr)
    if check and problems:
        return 1
    print("cuda/prebuilt is what the sources give" if check else f"wrote {images.PREBUILT}")
    return 0


def compiler_library() -> Path:
    """The pinned NVRTC, installed first where it is not yet. Raises BuildError."""
    if not _installed():
        _install()
    found = list(VENV.glob(f"lib/python*/site-packages/{LIBRARY}"))
    if len(found) != 1:
        raise BuildError(f"{LIBRARY} is not in {VENV}: delete that folder and run this again")
    return found[0]


def _installed() -> bool:
    return STAMP.exists() and STAMP.read_text() == WHEEL


def _install() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise BuildError(f"the pinned compiler is for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    import fcntl

    VENV.parent.mkdir(exist_ok=True)
    with open(VENV.parent / "nvrtc.lock", "w") as lock:  # of several that find it missing, one installs it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _installed():
            _make_venv()


def _make_venv() -> None:
    shutil.rmtree(VENV, ignore_errors=True)
    _run("Python's venv module does not work (Debian, Ubuntu: apt install python3-venv)", "-m", "venv", str(VENV))
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch, "requirements.txt")
        pins.write_text(WHEEL + "\n")
        pip = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--retries", "2", "--no-deps"]
        failure = f"pip could not install {WHEEL.split()[0]}, which compiles the kernels (is the network there?)"
        _run(
            failure, *pip, "--only-binary", ":all:", "--require-hashes", "-r", str(pins), python=VENV / "bin" / "python"
        )
    STAMP.write_text(WHEEL)


def _run(failure: str, *arguments: str, python: str | Path = sys.executable) -> None:
    done = subprocess.run([str(python), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BuildError(failure + ":\n" + "\n".join(done.stdout.splitlines()[-8:]))


def jobs(folder: Path = sources.HERE) -> dict[str, tuple]:
    """What to build: file name -> (source, target, its folder)."""
    todo = {}
    for source in sources.SOURCES:
        todo |= {f"{source.name}.sm_{arch}.cubin": (source, f"sm_{arch}", folder) for arch in source.sass}
        if source.ptx:
            todo[f"{source.name}.ptx"] = (source, f"compute_{source.ptx}", folder)
    return todo


def compile_all(library: Path, folder: Path = sources.HERE, say=print) -> dict[str, tuple[bytes, dict]]:
    """file name -> (bytes, its entry in the manifest), on all cores. Raises CompileError."""
    began, built = time.monotonic(), {}
    todo = jobs(folder)
    with ProcessPoolExecutor(max_workers=min(len(todo), os.cpu_count() or 1)) as pool:
        done = {name: pool.submit(_compile, library, name, *job) for name, job in todo.items()}
        for name, result in done.items():
            *built[name], seconds = result.result()
            say(f"{name}: {len(built[name][0]) / 1024:.0f} KiB, {seconds:.1f} s")
    size = sum(len(data) for data, _ in built.values())
    say(f"{len(built)} files, {size / 2**20:.1f} MiB, {time.monotonic() - began:.1f} s")
    return built


def _compile(library: Path, file: str, source: sources.Source, target: str, folder: Path) -> tuple[bytes, dict, float]:
    began = time.monotonic()
    compiler = nvrtc.Compiler(library)
    kind, arch = ("sass", target[3:]) if target.startswith("sm_") else ("ptx", target[8:])
    options = [*sources.options(source, target), *([REPORT] if kind == "sass" else [])]
    data, log = compiler.compile(source.file, *sources.read(source, folder), options)
    entry = {
        "file": file,
        "name": source.name,
        "source": source.file,
        "kind": kind,
        "arch": arch,
        "toolkit": TOOLKIT,
        "options": options,
        "inputs": sources.fingerprint(source, target, _compiler_id(), folder),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "kernels": _resources(data, log, file) if kind == "sass" else _parameters(data),
    }
    return data, entry, time.monotonic() - began


def _compiler_id() -> str:
    return f"{WHEEL} {REPORT}"


def _parameters(data: bytes) -> dict[str, dict[str, int]]:
    return {name: {"parameters": kernel.parameters} for name, kernel in sorted(image_format.kernels(data).items())}


def _resources(data: bytes, log: str, file: str) -> dict[str, dict[str, int]]:
    """What each kernel needs: registers, bytes of static shared memory and of local memory (stack), bytes spilled.

    From the assembler's report; registers and local memory must be those in the file itself, or CompileError is raised.
    """
    result = _parameters(data)
    report = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)", re.DOTALL
    )  # fmt: skip
    for name, local, stores, loads, registers, rest in report.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        result[name] |= {
            "registers": int(registers),
            "shared": int(shared.group(1)) if shared else 0,
            "local": int(local),
            "spills": int(stores) + int(loads),
        }
    for name, kernel in image_format.kernels(data).items():
        reported = result[name].get("registers"), result[name].get("local")
        if reported != (kernel.registers, kernel.local):
            raise nvrtc.CompileError(
                f"{file}, {name}: reported registers and stack {reported} are not the file's: {kernel}"
            )
    return result


def manifest(built: dict[str, tuple[bytes, dict]]) -> str:
    return json.dumps({"format": 1, "files": [entry for _, entry in built.values()]}, indent=1) + "\n"


def write(built: dict[str, tuple[bytes, dict]], folder: Path = images.PREBUILT) -> None:
    """Replace the folder by these files and their manifest. Raises BuildError where they are too large together."""
    size = sum(len(data) for data, _ in built.values())
    if size > LIMIT:
        raise BuildError(f"the prebuilt files have {size} bytes, more than the {LIMIT} allowed: nothing was written")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        for name, (data, _) in built.items():
            (new / name).write_bytes(data)
        (new / images.MANIFEST).write_text(manifest(built), encoding="ascii", newline="\n")
        if folder.exists():
            os.replace(folder, Path(scratch, "old"))
        os.replace(new, folder)


def stale(folder: Path = images.PREBUILT, source_folder: Path = sources.HERE) -> list[str]:
    """What the manifest and the names of the files alone say is not up to date, in sentences. Compiles nothing."""
    try:
        entries = {entry["file"]: entry for entry in json.loads((folder / images.MANIFEST).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{images.MANIFEST} cannot be read ({error}): run python cuda/build.py"]
    wanted, problems = jobs(source_folder), []
    for name, (source, target, _) in wanted.items():
        inputs = sources.fingerprint(source, target, _compiler_id(), source_folder)
        if name not in entries or not (folder / name).is_file():
            problems.append(f"{name} is missing: run python cuda/build.py")
        elif entries[name].get("inputs") != inputs:
            problems.append(
                f"{name} is older than {source.file}, what it includes, or its options: run python cuda/build.py"
            )
    extra = {path.name for path in folder.iterdir()} | set(entries)
    problems += [
        f"{name} is not in the table of sources.py: delete it" for name in sorted(extra - {*wanted, images.MANIFEST})
    ]
    return problems


def compare(built: dict[str, tuple[bytes, dict]], folder: Path = images.PREBUILT) -> list[str]:
    """Which files are not byte for byte what was just built, in sentences. Line ends of text do not count."""
    problems = []
    wanted = {name: data for name, (data, _) in built.items()} | {images.MANIFEST: manifest(built).encode()}
    for name, data in wanted.items():
        there = (folder / name).read_bytes()
        if not name.endswith(".cubin"):
            there = there.replace(b"\r\n", b"\n")
        if there != data:
            problems.append(f"{name} is not what the present sources give: run python cuda/build.py")
    return problems


def resource_problems(built: dict[str, tuple[bytes, dict]]) -> list[str]:
    """Kernels that keep registers in memory, and files too large together, in sentences."""
    problems = []
    for name, (_, entry) in built.items():
        for kernel, needs in entry["kernels"].items():
            if needs.get("spills") or needs.get("local"):
                problems.append(
                    f"{name}: {kernel} spills {needs['spills']} bytes, {needs['local']} bytes of local memory"
                )
    size = sum(len(data) for data, _ in built.values())
    if size > LIMIT:
        problems.append(f"the prebuilt files have {size} bytes together, more than the {LIMIT} allowed")
    return problems


if __name__ == "__main__":
    sys.exit(main())
