"""Run the tests that matter most on other versions of torch: `python scripts/torch_matrix.py [2.6.0 2.14.1]`.

Each version gets an environment of its own below .cache/ (with CUDA's libraries, several GB), in which only torch and what must
match it exactly differ from .venv. The table goes into tests/hosts/TORCH.md.
"""

import os
import platform
import re
import subprocess
import sys
import sysconfig
from datetime import date

import environment
import host

# torch: torchvision and torchaudio that go with it.
VERSIONS = {"2.6.0": ("0.21.0", "2.6.0"), "2.14.1": ("0.29.1", "2.11.0")}
TESTS = ("tests/unit", "tests/kernels/test_svg2_attention.py", "tests/models/test_families.py", "tests/nodes/test_dense_with_a_reason.py",
         "tests/nodes/test_no_silence.py", "tests/nodes/test_newer_hosts.py", "tests/nodes/test_options_of_other_nodes.py",
         "tests/nodes/test_combinations_patches.py", "tests/nodes/test_precision_and_memory.py")  # fmt: skip
# The kernels' own tests are for the Triton that the checkout pins; the benchmarks' take long; texts are no matter of torch.
WITHOUT = "not triton and not benchmark and not readme and not test_each_sparse_call"
# torch 2.6 compiles only beside its own Triton 3.2, whose driver wants a GPU as soon as ComfyUI imports it.
WITHOUT_OF = {"2.6.0": " and not compile"}
TABLE = host.ROOT / "tests/hosts/TORCH.md"


def make(version: str) -> str:
    """The interpreter of a version's environment, made if need be."""
    folder = host.CACHE / f"torch-{version}"
    python = folder / "bin/python"
    if not (folder / "made").exists():
        vision, audio = VERSIONS[version]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={version}"], check=True)
        subprocess.run([*pip, "--no-deps", f"torchvision=={vision}", f"torchaudio=={audio}"], check=True)
        # Everything else is .venv's, behind what is here; Triton too, whose interpreter the tests know.
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", "triton"], check=True)
        site = subprocess.run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True)
        with open(os.path.join(site.stdout.strip(), "venv.pth"), "w", encoding="utf-8") as file:
            file.write(sysconfig.get_path("purelib") + "\n")
        (folder / "made").touch()
    return str(python)


def run(version: str) -> tuple[str, list[str]]:
    """-> pytest's last line, the failures."""
    without = WITHOUT + WITHOUT_OF.get(version, "")
    command = [make(version), "-m", "pytest", "-q", "-n", "2", "--tb=line", "-p", "no:cacheprovider", "-k", without, *TESTS]
    done = subprocess.run(command, cwd=host.ROOT, capture_output=True, text=True)
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1], failures


def main() -> int:
    environment.ensure()
    lines = ["# Other versions of torch", "", f"`python scripts/torch_matrix.py`, {date.today()}, Python {platform.python_version()}, ComfyUI {host.VERSION}, on a CPU:", "",
             "| torch | result | left out | failed |", "|---|---|---|---|"]  # fmt: skip
    for version in sys.argv[1:] or VERSIONS:
        result, failures = run(version)
        left_out = WITHOUT_OF.get(version, "").removeprefix(" and not ") or "nothing"
        lines.append(f"| {version} | {result.strip('= ')} | {left_out} | {', '.join(failures) or 'none'} |")
        print(lines[-1], flush=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    host.guarded(main)
