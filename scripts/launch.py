"""Start ComfyUI's own main.py the way `python main.py ARGS` does, after the shims a CPU-only torch needs.

python scripts/launch.py COMFYUI_PATH ARGS...
"""

import runpy
import sys
from pathlib import Path

import host

comfyui = Path(sys.argv[1])
host.shim_cpu_wheels()
sys.path[0] = str(comfyui)  # in place of this script's folder
sys.argv = [str(comfyui / "main.py"), *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
