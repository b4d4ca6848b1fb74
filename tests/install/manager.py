"""What ComfyUI-Manager does with the pack's files, done the same way (comfyui-manager 4.2.2, manager_core.py)."""

import os
import subprocess
import sys
from pathlib import Path


def install_script(pack: Path) -> subprocess.CompletedProcess:
    """install.py as Manager starts it: in the pack's folder, with ComfyUI's Python; -s as in the portable's start script."""
    environment = {**os.environ, "COMFYUI_PATH": str(pack.parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-s", "install.py"]
    return subprocess.run(command, cwd=pack, env=environment, capture_output=True, text=True, timeout=60)


def requirement(line: str) -> subprocess.CompletedProcess:
    """pip with one line of requirements.txt as its one argument; here without the package index and changing nothing."""
    options = ["--dry-run", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, line]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
