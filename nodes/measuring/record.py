"""The Doctor's record: a CSV file in ComfyUI's output folder, with the columns of the pack's own benchmark, for people to send."""

import csv
import platform
import re
import sys
import time
from pathlib import Path

import folder_paths
import torch

ROOT = Path(__file__).resolve().parents[2]
# As in tests/benchmarks, run.py and on_cpu.py, so that a record that was sent can be laid beside theirs.
FIELDS = {
    "cuda": ("gpu", "driver", "torch", "triton", "commit", "date", "shape", "tokens", "heads", "text", "q_clusters", "k_clusters",
             "stage", "method", "compensation", "density", "p20_ms", "p50_ms", "p80_ms", "extra_mib", "rel_l2"),
    "cpu": ("processor", "threads", "torch", "commit", "date", "dtype", "tokens", "heads", "stage", "method", "density", "rel_l2",
            "p20_ms", "p50_ms", "p80_ms", "times_faster", "extra_mib", "rounds"),
}  # fmt: skip


def save(records: list[dict], device: torch.device) -> Path:
    """Write a new file; -> where. Raises OSError where that cannot be done."""
    folder = Path(folder_paths.get_output_directory(), "svg2_doctor")
    folder.mkdir(parents=True, exist_ok=True)
    file, here = folder / f"{time.strftime('%Y-%m-%d_%H%M%S')}.csv", machine(device)
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, FIELDS[device.type], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**here, **record} for record in records)
    return file


def how_to_send(file: Path) -> str:
    page = issues_page()
    where = f"attach it to an issue at {page}" if page else "attach it to an issue where you got the pack"
    return f"record: {file}. To help others with this hardware, {where}; it names the hardware, the versions and the times, and nothing else."


def issues_page() -> str:
    """The project's page for issues, from the addresses in pyproject.toml; empty where there is none."""
    text = _project()
    if found := re.search(r'^"?(?:Issues|Bug Tracker)"?\s*=\s*"(https?://[^"]+)"', text, re.MULTILINE):
        return found[1]
    found = re.search(r'^"?(?:Repository|Source)"?\s*=\s*"(https?://[^"]+)"', text, re.MULTILINE)
    return found[1].removesuffix(".git").rstrip("/") + "/issues" if found else ""


def machine(device: torch.device) -> dict:
    """Where a record comes from, in the benchmark's words."""
    gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else "CPU",
        "driver": _driver() if gpu else "",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", ""),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """The commit that a clone has checked out; else the pack's version. A folder without .git may lie in ComfyUI's clone."""
    head = _read(ROOT / ".git/HEAD").strip()
    if head.startswith("ref: "):
        head = _read(ROOT / ".git" / head[5:]).strip()
    if re.fullmatch(r"[0-9a-f]{40,}", head):
        return head[:7]
    found = re.search(r'^version\s*=\s*"([^"]+)"', _project(), re.MULTILINE)
    return found[1] if found else ""


def _project() -> str:
    return _read(ROOT / "pyproject.toml")


def _driver() -> str:
    """NVIDIA's driver, where the system has a file that says it (Linux): no program is run for it."""
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", _read(Path("/proc/driver/nvidia/version")))
    return found[0] if found else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
