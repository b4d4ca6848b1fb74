"""The steps of rehearse_manager.py that run inside the environment with comfyui-manager, on Manager's own functions."""

import json
import os
import subprocess
import sys
from pathlib import Path

scratch, address = Path(sys.argv[1]), sys.argv[2]
COMFYUI = scratch / "ComfyUI"
sys.argv = [str(COMFYUI / "main.py"), "--cpu", "--enable-manager"]  # ComfyUI's modules read it
sys.path[0] = str(COMFYUI)
os.environ["COMFYUI_PATH"] = str(COMFYUI)
os.chdir(COMFYUI)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfyui_manager  # noqa: E402, F401
from comfyui_manager.common import cm_global, cnr_utils, context  # noqa: E402
from comfyui_manager.glob import manager_core  # noqa: E402

NODE = "svg2-sparse-attention"
CUSTOM_NODES = COMFYUI / "custom_nodes"
PACK = CUSTOM_NODES / NODE
SCHEDULED = Path(context.manager_startup_script_path) / "install-scripts.txt"
manager = manager_core.unified_manager

# What Manager's start sets, and the registry's answer: the one thing that needs its server.
cm_global.pip_blacklist, cm_global.pip_overrides, cm_global.pip_downgrade_blacklist = set(), {}, ["torch"]
ARCHIVES = {"0.0.9": "old.zip", "0.1.0": "new.zip"}


def registry_answer(node, version=None):
    version = version or "0.1.0"
    return cnr_utils.NodeVersion("", [], False, node, version, address + ARCHIVES[version])


cnr_utils.install_node = registry_answer
before = {path.name for path in CUSTOM_NODES.iterdir()} | {"__pycache__"}  # of the example node that ComfyUI has there


def step(name: str, result, *facts: bool) -> None:
    """One line of the protocol. Stops at the first surprise."""
    there = sorted({path.name for path in CUSTOM_NODES.iterdir()} - before)
    good = result.result and all(facts)
    outcome = "as expected" if good else f"FAILED {result.msg} {facts}"
    print(f"REHEARSED {name}: {outcome}; in custom_nodes: {', '.join(there) or 'nothing'}", flush=True)
    if not good:
        sys.exit(1)
    manager.processed_install.clear()  # Manager runs an installation once for each start of ComfyUI
    for path in CUSTOM_NODES.iterdir():
        if (path / "pyproject.toml").exists():
            manager.update_cache_at_path(str(path))


def version(pack: Path) -> str:
    """By the status file, which only install.py writes."""
    return json.loads((pack / ".cache" / "install_status.json").read_text())["version"]


def is_gone() -> bool:
    return {path.name for path in CUSTOM_NODES.iterdir()} <= before | {".disabled"} and os.listdir(CUSTOM_NODES / ".disabled") == []


def by_registry() -> None:
    done = manager.cnr_install(NODE, "0.0.9", instant_execution=True)
    step("registry, install 0.0.9", done, version(PACK) == "0.0.9", (PACK / "nodes/gone.py").exists())
    done = manager.cnr_switch_version(NODE, "0.1.0", instant_execution=True)
    step("registry, update to 0.1.0", done, version(PACK) == "0.1.0", not (PACK / "nodes/gone.py").exists())
    disabled = CUSTOM_NODES / ".disabled" / f"{NODE}@0_1_0"
    step("registry, disable", manager.unified_disable(NODE, False), not PACK.exists(), disabled.is_dir())
    step("registry, enable", manager.unified_enable(NODE, "0.1.0"), PACK.is_dir(), version(PACK) == "0.1.0")
    step("registry, uninstall", manager.unified_uninstall(NODE, False), is_gone())


def by_git() -> None:
    pack, origin = CUSTOM_NODES / "ComfyUI-SVG2", f"file://localhost{scratch / 'ComfyUI-SVG2.git'}"
    done = manager.repo_install(origin, str(pack), instant_execution=True)
    step("git, install", done, version(pack) == "0.1.0")
    (key,) = manager.unknown_active_nodes
    work = scratch / "work"
    about = work / "pyproject.toml"
    about.write_text(about.read_text().replace('version = "0.1.0"', 'version = "0.2.0"'))
    for command in ("git rm -q nodes/doctor.py", "git -c user.name=x -c user.email=x@example.org commit -qam two"):
        subprocess.run(command.split(), cwd=work, check=True)
    subprocess.run(["git", "push", "-q", str(scratch / "ComfyUI-SVG2.git"), "HEAD"], cwd=work, check=True)
    done = manager.repo_update(str(pack), instant_execution=True)
    step("git, update", done, version(pack) == "0.2.0", not (pack / "nodes/doctor.py").exists())
    step("git, disable", manager.unified_disable(key, True), not pack.exists())
    step("git, enable", manager.unified_enable(key, "unknown"), pack.is_dir())
    step("git, uninstall", manager.unified_uninstall(key, True), is_gone())


def deferred() -> None:
    """As on Windows: at the next start of ComfyUI, before it has imported anything."""
    step("deferred, install 0.0.9 now", manager.cnr_install(NODE, "0.0.9", instant_execution=True))
    manager_core.get_config()["always_lazy_install"] = True
    step("deferred, update to 0.1.0 is scheduled", manager.cnr_switch_version(NODE, "0.1.0"), version(PACK) == "0.0.9", SCHEDULED.exists())
    command = [sys.executable, str(COMFYUI / "main.py"), "--cpu", "--enable-manager", "--quick-test-for-ci", "--disable-api-nodes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = done.stdout + done.stderr
    (scratch / "start.log").write_text(said)
    done.result, done.msg = done.returncode == 0, said[-3000:]
    loaded = "IMPORT FAILED" not in said and said.rfind("Import times for custom nodes") < said.rfind(f"custom_nodes/{NODE}")
    step("deferred, the start", done, loaded, version(PACK) == "0.1.0", not SCHEDULED.exists(), "[SVG2] version 0.1.0" in said)
    print(f"REHEARSED deferred, files of 0.0.9 that 0.1.0 has not are left behind: {(PACK / 'nodes/gone.py').exists()}")
    manager_core.get_config()["always_lazy_install"] = False
    step("deferred, uninstall", manager.unified_uninstall(NODE, False), is_gone())


by_registry()
by_git()
deferred()
home = sorted({"/".join(path.relative_to(scratch / "home").parts[:2]) for path in (scratch / "home").rglob("*") if path.is_file()})
print(f"REHEARSED what is left in the home folder: {', '.join(home) or 'nothing'}")
