"""What ComfyUI-Manager does with the pack's files, done the same way (comfyui-manager 4.2.2, manager_core.py)."""

import os
import subprocess
import sys
from pathlib import Path


def requirements(pack: Path) -> list[str]:
    """The lines of requirements.txt that Manager hands to pip, one by one."""
    lines = (line.split("#")[0].strip() for line in (pack / "requirements.txt").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def install_script(pack: Path) -> subprocess.CompletedProcess:
    """install.py as Manager starts it: in the pack's folder, with ComfyUI's Python; -s as in the portable's start script."""
    environment = {**os.environ, "COMFYUI_PATH": str(pack.parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-s", "install.py"]
    return subprocess.run(command, cwd=pack, env=environment, capture_output=True, text=True, timeout=60)
