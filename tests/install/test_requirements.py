"""requirements.txt and the commands that the pack advises replace nothing: pip, on machines made of stubs, would change nothing else.

ComfyUI-Manager runs pip on the user's machine, and whatever provides the import package `triton` there, under one name of
many, pip knows by that name alone.
"""

import os
import re
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
from manager import requirements
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
# Distributions as they lie beside each other in users' environments. All are older than the wheels that pip finds.
MACHINES = {
    "ROCm": {"torch": "2.6.0+rocm6.2.4", "pytorch-triton-rocm": "3.2.0", "einops": "0.6.0", "safetensors": "0.4.2"},
    "XPU": {"torch": "2.7.1+xpu", "pytorch-triton-xpu": "3.3.1", "einops": "0.6.0", "safetensors": "0.4.2"},
    "nightly": {"torch": "2.8.0.dev20250601+cu128", "pytorch-triton": "3.3.1+gitc8757738", "einops": "0.6.0", "safetensors": "0.4.2"},
    "CUDA": {"torch": "2.5.1+cu121", "triton": "3.1.0", "einops": "0.6.0", "safetensors": "0.4.2"},
    "Windows": {"torch": "2.7.0+cu128", "triton-windows": "3.3.0.post19", "einops": "0.6.0", "safetensors": "0.4.2"},
}
NEWER = {"torch": "2.14.0", "triton": "3.8.0", "triton-windows": "3.8.0.post29", "einops": "0.8.2", "safetensors": "0.8.0"}
SYSTEMS = {
    "win32": {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    "darwin": {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
}


def metadata(name: str, version: str, needs: tuple[str, ...] = ()) -> str:
    return "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs), ""])


def wheel(folder: Path, name: str, version: str) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        file.writestr(f"{stem}.dist-info/METADATA", metadata(name, version))
        file.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An environment with pip alone, and a folder of wheels that stands for the package index: (python, site-packages, wheels)."""
    base = tmp_path_factory.mktemp("machine")
    venv.create(base / "venv", with_pip=True, symlinks=os.name != "nt")
    python = base / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    place = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(place, capture_output=True, encoding="utf-8", check=True, env=environment()).stdout.strip())
    (base / "wheels").mkdir()
    for name, version in NEWER.items():
        wheel(base / "wheels", name, version)
    for version in ("3.2.0", "3.3.1"):
        wheel(base / "wheels", "triton", version)
        wheel(base / "wheels", "triton-windows", version + ".post21")
    return python, site, base / "wheels"


def environment() -> dict[str, str]:
    """Without the settings of the pip that runs the tests, and with its output in one encoding."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | {"PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def would_install(bare, tmp_path):
    """would_install(distributions, *arguments of `pip install`): what pip would then install, as NAME-VERSION."""
    python, site, wheels = bare
    made = []

    def ask(distributions: dict[str, str], *arguments: str, needs: tuple[str, ...] = ()) -> set[str]:
        for name, version in distributions.items():
            folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            made.append(folder)
            (folder / "METADATA").write_text(metadata(name, version, needs if name == "torch" else ()), encoding="utf-8")
            (folder / "INSTALLER").write_text("pip\n", encoding="utf-8")
            (folder / "RECORD").write_text("", encoding="utf-8")
        options = ["--isolated", "--disable-pip-version-check", "install", "--dry-run", "--no-index", "--find-links", str(wheels)]
        done = subprocess.run([str(python), "-m", "pip", *options, *arguments], cwd=tmp_path, capture_output=True, encoding="utf-8", env=environment(), timeout=120)
        assert done.returncode == 0, done.stderr
        return set(re.sub(r".*Would install ", "", done.stdout, flags=re.DOTALL).split()) if "Would install" in done.stdout else set()

    yield ask
    for folder in made:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


@pytest.mark.parametrize("machine", MACHINES)
def test_nothing_is_installed(would_install, machine):
    assert would_install(MACHINES[machine], "-r", str(ROOT / "requirements.txt")) == set()


def test_the_stubs_would_notice(would_install):
    """NVIDIA's Triton over AMD's, for the requirements that were there once."""
    assert would_install(MACHINES["ROCm"], "triton") == {"triton-3.8.0"}


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_line_names_what_torch_brings(system):
    """Whatever the markers say: nothing of torch, of CUDA or of Triton."""
    names = {canonicalize_name(r.name) for r in map(Requirement, requirements(ROOT)) if r.marker is None or r.marker.evaluate(SYSTEMS[system])}
    assert not [name for name in names if any(word in name for word in ("triton", "torch", "cuda", "nvidia"))]


def test_lines_as_manager_takes_them():
    """One by one: each is one requirement, without a version that could lower another, option, address, or anything to compile."""
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").isascii()
    for requirement in map(Requirement, requirements(ROOT)):
        assert requirement.url is None and not requirement.specifier


def test_the_advice_for_linux_brings_back_torchs_own_triton(would_install):
    """`pip install torch`: the release that torch asks for, not the newest, and no other torch."""
    torch = {"torch": "2.7.1+cu128"}
    assert would_install(torch, "torch", needs=("triton==3.3.1",)) == {"triton-3.3.1"}


def test_nor_does_a_wrong_triton_stay(would_install):
    assert would_install({"torch": "2.7.1+cu128", "triton": "3.1.0"}, "torch", needs=("triton==3.3.1",)) == {"triton-3.3.1"}


def test_the_advice_for_windows_takes_the_pinned_minor_version(would_install):
    """And leaves torch alone."""
    assert would_install(MACHINES["Windows"], "triton-windows>=3.3.1,<3.4") == {"triton-windows-3.3.1.post21"}


def test_a_new_enough_one_stays(would_install):
    assert would_install(MACHINES["Windows"], "triton-windows>=3.3,<3.4") == set()
