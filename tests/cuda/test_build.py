"""cuda/build.py, run as its users run it, in a copy of cuda/ with a small kernel in place of the real one."""

import hashlib
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
NAME, HOPPER = "near_field_fa2", "near_field_fa3"

pytestmark = pytest.mark.xdist_group("nvrtc")  # one process: the first test may have to fetch the compiler

# One parameter by value, dynamic shared memory, a header, names with internal linkage (numbered by path, perhaps).
EXAMPLE = """
#include "example.cuh"
#ifdef NEVER
#include "not_there.h"
#endif
struct Params { const float* a; float* out; long long n; float scale; };
static __device__ float halved(float x) { return x / 2; }
namespace { __device__ float doubled(float x) { return x * 2; } }

extern "C" __global__ __launch_bounds__(128) void add(const __grid_constant__ Params p) {
    extern __shared__ float tile[];
    __shared__ float fixed[32];
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    fixed[threadIdx.x % 32] = SHIFT;
    tile[threadIdx.x] = i < p.n ? doubled(p.a[i]) : halved(p.scale);
    __syncthreads();
    if (i < p.n) p.out[i] = tile[127 - threadIdx.x] * p.scale + fixed[(threadIdx.x + 1) % 32];
}
extern "C" __global__ void nothing(int a, long long b, char c) {}
"""

SPILLS = """
extern "C" __global__ __launch_bounds__(1024) void crowded(float* a, int n) {
    float x[90];
    #pragma unroll
    for (int i = 0; i < 90; i++) x[i] = a[i * 1024 + threadIdx.x];
    for (int k = 0; k < n; k++) {
        #pragma unroll
        for (int i = 0; i < 90; i++) x[i] = x[i] * x[(i + 7) % 90] + a[k];
    }
    #pragma unroll
    for (int i = 0; i < 90; i++) a[i * 1024 + threadIdx.x] = x[i];
}
"""


@pytest.fixture(scope="session")
def compiler():
    """The pinned compiler's environment, fetched if it is not there yet."""
    code = "import sys; sys.path[0] = sys.argv[1]; from cuda import build; build.compiler_library(); print(build.VENV)"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, timeout=600)
    if "the pinned compiler is for Linux on x86-64" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def copy_of_cuda(folder, source=EXAMPLE, compiler=None):
    shutil.copytree(
        ROOT / "cuda", folder / "cuda", ignore=shutil.ignore_patterns("__pycache__", "prebuilt", "*.cu", "*.cuh")
    )
    (folder / "cuda" / f"{NAME}.cu").write_text(source)
    (folder / "cuda" / f"{HOPPER}.cu").write_text(EXAMPLE)
    (folder / "cuda" / "example.cuh").write_text("#define SHIFT 1.5f\n")
    if compiler:
        (folder / ".cache").mkdir()
        (folder / ".cache" / compiler.name).symlink_to(compiler)
    return folder


def build(folder, *arguments, cwd=None, **environment):
    command = [sys.executable, str(folder / "cuda" / "build.py"), *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(command, cwd=cwd or folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def built(compiler, tmp_path_factory):
    """A folder with the example built in it; not to be changed."""
    folder = copy_of_cuda(tmp_path_factory.mktemp("built"), compiler=compiler)
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def checkout(built, tmp_path):
    """A copy of it that may be changed."""
    return Path(shutil.copytree(built, tmp_path / "copy", symlinks=True))


def content(folder):
    return {path.name: path.read_bytes() for path in (folder / "cuda" / "prebuilt").iterdir()}


def test_what_is_built(built):
    files = content(built)
    manifest = json.loads(files.pop("manifest.json"))
    assert [entry["file"] for entry in manifest["files"]] == [
        *(f"{NAME}.sm_{arch}.cubin" for arch in (80, 86, 89, 90, 100, 120)), f"{NAME}.ptx", f"{HOPPER}.sm_90a.cubin"
    ]  # fmt: skip
    assert {entry["file"] for entry in manifest["files"]} == set(files)
    for entry in manifest["files"]:
        data = files[entry["file"]]
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
        assert entry["toolkit"] == "12.8.93" and entry["source"] == f"{entry['name']}.cu" and len(entry["inputs"]) == 64
        # The sizes of the parameters by the C rules: 8 + 8 + 8 + 4, up to a multiple of 8; and 4, 8 at 8, 1 at 16.
        assert {name: kernel["parameters"] for name, kernel in entry["kernels"].items()} == {"add": 32, "nothing": 17}
        if entry["kind"] == "sass":
            add = entry["kernels"]["add"]
            assert add["shared"] == 128 and add["local"] == add["spills"] == 0 and 8 <= add["registers"] <= 64
    assert len({entry["inputs"] for entry in manifest["files"]}) == 8


def test_the_simulated_driver_and_the_files_agree_on_architectures(built):
    from fake_driver import architecture, ptx_version

    files = content(built)
    for arch in (80, 86, 89, 90, 100, 120):
        assert architecture(files[f"{NAME}.sm_{arch}.cubin"]) == arch
    assert ptx_version(files[f"{NAME}.ptx"]) == 12080 and b".target sm_80\n" in files[f"{NAME}.ptx"]


def test_built_again_elsewhere_it_is_the_same_bytes(built, compiler, tmp_path):
    """Another folder, another working folder, another time zone and language, one core's worth of workers or two."""
    (tmp_path / "ein Ort").mkdir()
    folder = copy_of_cuda(tmp_path / "ein Ort", compiler=compiler)
    done = build(folder, cwd="/", TZ="Asia/Tokyo", LC_ALL="C", HOME=str(tmp_path), PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    assert content(folder) == content(built)
    assert not [name for name, data in content(folder).items() if str(tmp_path).encode() in data]


def test_check_passes_and_writes_nothing(checkout):
    before = {path: path.stat().st_mtime_ns for path in checkout.rglob("*")}
    done = build(checkout, "--check")
    assert done.returncode == 0, done.stderr
    assert "cuda/prebuilt is what the sources give" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in checkout.rglob("*")} == before


def change_header(folder):
    (folder / "cuda" / "example.cuh").write_text("#define SHIFT 1.25f\n")
    return f"{NAME}.sm_80.cubin is older than {NAME}.cu, what it includes, or its options"


def change_source(folder):
    (folder / "cuda" / f"{NAME}.cu").write_text(EXAMPLE + "// a comment\n")
    return f"{NAME}.ptx is older than"


def change_options(folder):
    path = folder / "cuda" / "sources.py"
    path.write_text(path.read_text().replace('OPTIONS = ("--std=c++17", ', 'OPTIONS = ("--std=c++20", '))
    return f"{NAME}.sm_120.cubin is older than"


def flip_a_bit(folder):
    path = folder / "cuda" / "prebuilt" / f"{NAME}.sm_90.cubin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return f"{NAME}.sm_90.cubin is not what the present sources give"


def change_ptx_and_its_hash(folder):
    path = folder / "cuda" / "prebuilt" / f"{NAME}.ptx"
    path.write_text(path.read_text().replace("add.f32", "sub.f32"))
    return f"{NAME}.ptx is not what the present sources give"


def change_the_manifest(folder):
    path = folder / "cuda" / "prebuilt" / "manifest.json"
    path.write_text(path.read_text().replace('"spills": 0', '"spills": 1', 1))
    return "manifest.json is not what the present sources give"


def delete_a_file(folder):
    (folder / "cuda" / "prebuilt" / f"{NAME}.sm_86.cubin").unlink()
    return f"{NAME}.sm_86.cubin is missing"


def add_a_file(folder):
    (folder / "cuda" / "prebuilt" / "other.sm_80.cubin").write_bytes(b"")
    return "other.sm_80.cubin is not in the table of sources.py"


def delete_the_manifest(folder):
    (folder / "cuda" / "prebuilt" / "manifest.json").unlink()
    return "manifest.json cannot be read"


@pytest.mark.parametrize(
    "change",
    [
        change_header, change_source, change_options, flip_a_bit, change_ptx_and_its_hash, change_the_manifest,
        delete_a_file, add_a_file, delete_the_manifest,
    ],
)  # fmt: skip
def test_check_fails_and_says_why(checkout, change):
    sentence = change(checkout)
    before = content(checkout)
    done = build(checkout, "--check")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {sentence}" in done.stderr, done.stderr
    assert content(checkout) == before
    if change in (change_header, add_a_file):  # and building makes it right again
        assert build(checkout).returncode == 0 and build(checkout, "--check").returncode == 0


def test_line_ends_that_git_changed_are_no_change(checkout):
    for path in (checkout / "cuda").rglob("*"):
        if path.suffix in (".cu", ".cuh", ".ptx", ".json"):
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    done = build(checkout, "--check")
    assert done.returncode == 0, done.stderr


def test_spills_are_told_and_fail_the_check(compiler, tmp_path):
    folder = copy_of_cuda(tmp_path, SPILLS, compiler)
    done = build(folder)
    assert done.returncode == 0 and re.search(
        rf"warning: {NAME}\.sm_80\.cubin: crowded spills [1-9]\d+ bytes", done.stderr
    )
    done = build(folder, "--check")
    assert done.returncode == 1 and re.search(
        rf"error: {NAME}\.sm_120\.cubin: crowded spills [1-9]\d+ bytes", done.stderr
    )


def test_a_source_that_does_not_compile(compiler, tmp_path):
    folder = copy_of_cuda(tmp_path, EXAMPLE.replace("SHIFT;", "SHIFTED;"), compiler)
    done = build(folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f'{NAME}.cu(14): error: identifier "SHIFTED" is undefined' in done.stderr
    assert not (folder / "cuda" / "prebuilt").exists()


def test_toolkit_headers_are_not_found(compiler, tmp_path):
    """User machines have none; a source that needs one must not build here either."""
    folder = copy_of_cuda(tmp_path, '#include "cuda_bf16.h"\n' + EXAMPLE, compiler)
    done = build(folder)
    assert done.returncode == 2 and "cuda_bf16.h" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="another sentence elsewhere")
def test_without_the_compiler_and_the_network(tmp_path, built):
    folder = copy_of_cuda(tmp_path)
    shutil.copytree(built / "cuda" / "prebuilt", folder / "cuda" / "prebuilt")
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    done = build(folder, "--check", **offline)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: pip could not install nvidia-cuda-nvrtc-cu12==12.8.93, which compiles the kernels" in done.stderr


def test_files_too_large_together(monkeypatch, tmp_path):
    from svg2_pack.cuda import build

    monkeypatch.setattr(build, "LIMIT", 100)
    files = {"a.cubin": (bytes(60), {"kernels": {}}), "b.cubin": (bytes(60), {"kernels": {}})}
    with pytest.raises(build.BuildError, match="120 bytes, more than the 100 allowed"):
        build.write(files, tmp_path / "prebuilt")
    assert not (tmp_path / "prebuilt").exists()
    assert build.resource_problems(files) == ["the prebuilt files have 120 bytes together, more than the 100 allowed"]


def test_the_real_files_are_of_the_present_sources():
    """Whether they are so byte for byte takes the compiler: python cuda/build.py --check."""
    from svg2_pack.cuda import build, images

    assert build.stale() == []
    assert sum(path.stat().st_size for path in images.PREBUILT.iterdir()) <= 12 << 20
    for image in images.all_images():
        images.read(image)


def test_resources_as_nvidias_own_tool_reads_them(manifest):
    """cuobjdump comes with Triton's wheel."""
    triton = pytest.importorskip("triton")
    tool = (
        Path(triton.__file__).parent
        / "backends"
        / "nvidia"
        / "bin"
        / ("cuobjdump.exe" if os.name == "nt" else "cuobjdump")
    )
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump")
    for file, entry in manifest.items():
        if entry["kind"] == "sass":
            command = [str(tool), "-res-usage", str(ROOT / "cuda" / "prebuilt" / file)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
            assert {name: (int(r), int(s) + int(x)) for name, r, s, x in found} == {
                name: (kernel["registers"], kernel["local"]) for name, kernel in entry["kernels"].items()
            }
