"""install.py as Manager runs it, in a copy of the pack: always exit code 0, ASCII, and the right sentence."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAME = "near_field_fa2"
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]

# Runs install.py's functions with a simulated driver in place of the machine's. Arguments: install.py, the options.
SIMULATED = """
import importlib.util, json, sys
install_py, tests, options = sys.argv[1:]
options = json.loads(options)
started = []
kinds = ("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "socket.connect", "urllib.")
sys.addaudithook(lambda event, arguments: started.append((event, arguments)) if event.startswith(kinds) else None)
sys.path.insert(0, tests)
from fake_driver import FakeDriver
sys.path[:0] = options.pop("path")
spec = importlib.util.spec_from_file_location("install", install_py)
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)
fake = FakeDriver(*map(tuple, options.pop("gpus")), **options)
install.main(load_driver=lambda: sys.modules["svg2_install_cuda.api"].Driver(fake))
assert not started and not {"torch", "triton"} & set(sys.modules), "it started, reached or imported what it must not"
assert "cuModuleLoadDataEx" not in fake.names() and "cuDevicePrimaryCtxRetain" not in fake.names() and not fake.faults
"""


@pytest.fixture
def pack(tmp_path):
    """A copy of the pack's files that install.py reads, in a folder with spaces and letters outside ASCII."""
    folder = tmp_path / "Grüße an 木 Comfy" / "custom_nodes" / "svg2 (1)"
    shutil.copytree(ROOT / "cuda", folder / "cuda", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("install.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def site(tmp_path):
    """site(...) -> a folder of packages to find: torch, its compiler, Triton. None can be imported."""

    def make(cuda="12.8", nvrtc=True, triton=True):
        folder = tmp_path / "site"
        packages = {"torch": "2.13.0+cu128"} | ({"triton": "3.7.1"} if triton else {})
        for name, version in packages.items():
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text(f"__version__ = '{version}'\nraise AssertionError('imported')")
            (folder / f"{name}-{version}.dist-info").mkdir()
            (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        lines = ["from typing import Optional", f"cuda: Optional[str] = {cuda!r}", "hip: Optional[str] = None"]
        (folder / "torch" / "version.py").write_text("\n".join(lines))
        library = "torch/lib/nvrtc64_120_0.dll" if os.name == "nt" else "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
        if nvrtc:
            (folder / library).parent.mkdir(parents=True)
            (folder / library).write_bytes(b"")
        return str(folder)

    return make


def checked(done):
    """The output's lines: exit code 0, nothing on stderr, ASCII, every line marked as ours."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    lines = done.stdout.decode("ascii").splitlines()
    assert lines and all(line.startswith("[SVG2] ") for line in lines)
    assert "check skipped" not in done.stdout.decode()
    return [line.removeprefix("[SVG2] ") for line in lines]


def run(pack, *gpus, site=None, **options):
    """install.py on a machine with these GPUs; its lines and the status file's content."""
    options = json.dumps({"gpus": gpus, "path": [site] if site else [], **options})
    # -S: without the packages that are really installed here.
    command = [sys.executable, "-S", "-c", SIMULATED, str(pack / "install.py"), str(HERE), options]
    lines = checked(subprocess.run(command, cwd=pack, capture_output=True, timeout=60))
    status = json.loads((pack / ".cache" / "install_status.json").read_text(encoding="ascii"))
    return lines, status


def runs_as(lines):
    return [line.split(": ", 1)[1] for line in lines if line.lstrip().startswith(f"{NAME} can run as: ")]


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="says what is missing only where it is missing")
def test_as_manager_runs_it_without_a_gpu(pack):
    done = subprocess.run([sys.executable, "install.py"], cwd=pack, capture_output=True, timeout=60)
    lines = checked(done)
    assert lines[0] == f"version {VERSION}"
    assert "prebuilt CUDA kernels: 8 files intact" in lines
    assert any(line.startswith("GPU: none that SVG2 can use: no NVIDIA driver is installed") for line in lines)
    assert any("SVG2 needs an NVIDIA GPU of compute capability 8.0" in line for line in lines)
    status = json.loads((pack / ".cache" / "install_status.json").read_text())
    assert status["version"] == VERSION and status["gpus"] == [] and status["intact"] == 8


def test_a_driver_that_sees_no_gpu(pack):
    lines, status = run(pack)
    assert "GPU: none that SVG2 can use: words for 100" in lines and status["gpus"] == []


def test_with_everything_in_place(pack, site):
    lines, status = run(pack, (8, 9), (9, 0), site=site())
    assert runs_as(lines) == ["prebuilt sm_89", "prebuilt sm_90"]
    assert (
        "GPU 0: NVIDIA GeForce RTX 4090, compute capability 8.9" in lines and "NVIDIA driver: knows CUDA 12.8" in lines
    )
    assert "torch: 2.13.0+cu128, for CUDA 12.8" in lines and "triton: 3.7.1" in lines
    assert not any("to get faster" in line or "not better because" in line for line in lines)
    assert status["version"] == VERSION and status["driver"] == [12, 8]
    assert [gpu["kernels"][NAME]["kind"] for gpu in status["gpus"]] == ["sass", "sass"]


def test_kernels_for_hopper_are_told_of_on_hopper_alone(pack, site):
    """On another GPU they are nothing that is missing."""
    folder = site()
    _, status = run(pack, (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0), site=folder, version=13010)
    told = [gpu["capability"] for gpu in status["gpus"] if "near_field_fa3" in gpu["kernels"]]
    assert told == [[9, 0]] and all(NAME in gpu["kernels"] for gpu in status["gpus"])
    assert status["gpus"][2]["kernels"]["near_field_fa3"] == {"runs": "prebuilt sm_90a", "kind": "sass", "reasons": []}
    assert not any("to get faster" in line for line in run(pack, (9, 0), site=folder)[0])


def test_a_corrupted_file(pack, site):
    path = pack / "cuda" / "prebuilt" / f"{NAME}.sm_89.cubin"
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    lines, status = run(pack, (8, 9), site=site())
    assert runs_as(lines) == ["prebuilt sm_86"]
    sentence = f"{NAME}.sm_89.cubin is damaged or foreign: its sha256 is not the one in manifest.json"
    assert f"prebuilt CUDA kernels: {sentence}" in lines and f"    not better because: {sentence}" in lines
    assert "prebuilt CUDA kernels: 7 files intact" in lines and status["damaged"] == [sentence]
    assert any("to get faster: install this pack again" in line for line in lines)


@pytest.mark.parametrize(
    ("nvrtc", "triton", "expected", "kind"),
    [
        (True, True, "compiled by torch's NVRTC at its first use", "nvrtc"),
        (False, True, "Triton kernels", "triton"),
        (False, False, "dense attention", "torch"),
    ],
)
def test_without_prebuilt_files(pack, site, nvrtc, triton, expected, kind):
    shutil.rmtree(pack / "cuda" / "prebuilt")
    lines, status = run(pack, (12, 0), site=site(nvrtc=nvrtc, triton=triton))
    assert runs_as(lines) == [expected] and status["gpus"][0]["kernels"][NAME]["kind"] == kind
    assert "prebuilt CUDA kernels: the list of prebuilt files, manifest.json, is missing" in lines
    if not triton:
        (advice,) = (line for line in lines if "on Triton" in line)
        pin = 'pip install "triton-windows>=3.7,<3.8"' if os.name == "nt" else "pip install torch, which brings its Triton"
        assert advice == f"to get faster: {pin}: clustering and the block map run on Triton"


@pytest.mark.parametrize("distribution", ["pytorch-triton", "pytorch-triton-xpu", "triton-windows"])
def test_triton_under_another_name(pack, site, distribution):
    """It is one import package with many distributions: none of them is said to be missing."""
    folder = Path(site())
    (folder / "triton-3.7.1.dist-info").rename(folder / f"{distribution.replace('-', '_')}-3.7.1.dist-info")
    lines, status = run(pack, (8, 9), site=str(folder))
    assert "triton: 3.7.1" in lines and status["triton"] == "3.7.1" and status["advice"] == []
    (folder / "triton" / "__init__.py").write_text("raise AssertionError('imported')")
    lines, status = run(pack, (8, 9), site=str(folder))
    assert "triton: of unknown version" in lines and status["advice"] == []


def test_an_unknown_architecture(pack, site):
    lines, _ = run(pack, (13, 0), site=site(), version=13010, name="Zukünftige™ GPU")
    assert "GPU 0: Zuk\\xfcnftige\\u2122 GPU, compute capability 13.0" in lines
    assert runs_as(lines) == ["prebuilt PTX compute_80 (the driver compiles it at its first use)"]
    assert "    not better because: no prebuilt machine code is for compute capability 13.0" in lines


def test_an_old_gpu(pack, site):
    lines, status = run(pack, (7, 5), site=site())
    assert runs_as(lines) == ["dense attention"] and status["gpus"][0]["kernels"][NAME]["kind"] == "torch"
    assert "    not better because: the kernels need compute capability 8.0" in lines


def test_too_old_a_driver(pack, site):
    lines, _ = run(pack, (8, 6), site=site(nvrtc=False), version=11080)
    assert runs_as(lines) == ["Triton kernels"]
    assert any(
        "prebuilt sm_86 needs an NVIDIA driver that knows CUDA 12.0, this one knows 11.8" in line for line in lines
    )
    assert "to get faster: update the NVIDIA driver to one that knows CUDA 12.0 (525 or newer)" in lines


def test_a_driver_too_old_for_ptx(pack, site):
    lines, _ = run(pack, (8, 7), site=site(), version=12040)
    assert runs_as(lines) == ["compiled by torch's NVRTC at its first use"]
    assert "to get faster: update the NVIDIA driver to one that knows CUDA 12.8 (570 or newer)" in lines


def test_a_torch_that_cannot_use_the_gpu(pack, site):
    lines, _ = run(pack, (8, 6), site=site(cuda=None))
    assert "torch: 2.13.0+cu128, not a CUDA build" in lines
    assert "to get faster: install a CUDA build of torch: this one cannot use the GPU" in lines


def test_a_driver_without_a_function(pack, site):
    code = SIMULATED.replace("install.main(", "del fake.cuModuleLoadDataEx\ninstall.main(")
    options = json.dumps({"gpus": [[8, 9]], "path": [site()]})
    command = [sys.executable, "-S", "-c", code, str(pack / "install.py"), str(HERE), options]
    lines = checked(subprocess.run(command, cwd=pack, capture_output=True, timeout=60))
    assert "GPU: none that SVG2 can use: the NVIDIA driver does not have it" in lines


def read_only(pack):
    pack.chmod(0o555)


def a_file_in_its_place(pack):
    (pack / ".cache").write_text("not a folder")


@pytest.mark.parametrize("make", [read_only, a_file_in_its_place])
def test_a_folder_that_cannot_be_written(pack, make):
    if make is read_only and (os.name == "nt" or os.geteuid() == 0):
        pytest.skip("permissions stop neither an administrator nor Windows")
    make(pack)
    try:
        done = subprocess.run([sys.executable, "-S", "install.py"], cwd=pack, capture_output=True, timeout=60)
    finally:
        pack.chmod(0o755)
    lines = checked(done)
    assert lines[-1].startswith("the status file was not written (") and lines[-1].endswith("); that does no harm")


@pytest.mark.parametrize("spoil", ["no cuda folder", "broken survey", "no pyproject", "closed output"])
def test_surprises(pack, spoil):
    stdout = subprocess.PIPE
    if spoil == "no cuda folder":
        shutil.rmtree(pack / "cuda")
    elif spoil == "broken survey":
        (pack / "cuda" / "survey.py").write_text("this is no Python ü", encoding="utf-8")
    elif spoil == "no pyproject":
        (pack / "pyproject.toml").unlink()
    elif spoil == "closed output":
        reader, stdout = os.pipe()
        os.close(reader)
    # As on a Windows console of an old code page, where only ASCII is safe.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-S", "install.py"]
    done = subprocess.run(command, cwd=pack, stdout=stdout, stderr=subprocess.PIPE, env=environment, timeout=60)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    if spoil == "closed output":
        os.close(stdout)
    else:
        assert b"[SVG2] check skipped: " in done.stdout and done.stdout.isascii()


def test_with_pythons_search_path_of_the_windows_portable(pack):
    """The embedded Python does not put the script's folder on its path: neither does -P (from 3.11 on) nor -I."""
    done = subprocess.run([sys.executable, "-I", str(pack / "install.py")], cwd="/", capture_output=True, timeout=60)
    assert "prebuilt CUDA kernels: 8 files intact" in checked(done)
    assert (pack / ".cache" / "install_status.json").exists()


def test_what_install_imports_is_the_standard_library():
    """And nothing that starts programs, opens connections or runs text; nor do the files of cuda/ that it uses."""
    used = ("survey", "triton_advice", "images", "image_format", "api", "sources", "nvrtc", "local_build", "cache")
    for name in ("install.py", *(f"cuda/{n}.py" for n in used)):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                top = module.split(".")[0]
                if name == "cuda/local_build.py" and top == "torch":
                    continue  # inside a function that install.py does not call
                assert top in sys.stdlib_module_names and top not in ("subprocess", "socket", "urllib", "http"), (
                    name,
                    module,
                )
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), name
