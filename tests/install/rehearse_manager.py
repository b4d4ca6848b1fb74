"""The pack's life in the hands of the real ComfyUI-Manager, in a scratch ComfyUI: `python tests/install/rehearse_manager.py FOLDER`.

Run it with .venv's Python. It makes an environment of its own under FOLDER, installs comfyui-manager there from the package index
(the one thing it needs a network for), copies ComfyUI, packs the registry's archives of this checkout and of a made-up older version,
and runs Manager's own code (manager_steps.py), with one thing replaced: the registry's answer, which names an archive on localhost.
"""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from host import find  # noqa: E402

MANAGER = "comfyui-manager==4.2.2"

# Manager restarts main.py by itself, so what a CPU-only torch needs (host.py) has to come without scripts/launch.py.
SITECUSTOMIZE = f"""
import sys
if any(word.endswith(("main.py", "manager_steps.py")) for word in sys.orig_argv[1:3]):
    sys.path.insert(0, {str(ROOT / "scripts")!r})
    import host
    host.shim_cpu_wheels()
    sys.path.pop(0)
"""


def git(*command: str, cwd: Path = ROOT) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *command], cwd=cwd, capture_output=True, text=True, check=True).stdout


def tracked_files() -> list[str]:
    return [name for name in git("ls-files", "--cached", "--others", "--exclude-standard").splitlines() if (ROOT / name).is_file()]


def archive(target: Path, version: str, extra: dict[str, str]) -> None:
    """The registry's archive of this checkout, with another version and more files."""
    left_out = set(git("ls-files", "--cached", "--others", "--ignored", "--exclude-from=.comfyignore").splitlines())
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for name in tracked_files():
            if name == "pyproject.toml":
                file.writestr(name, (ROOT / name).read_text(encoding="utf-8").replace('version = "0.1.0"', f'version = "{version}"'))
            elif name not in left_out:
                file.write(ROOT / name, name)
        for name, text in extra.items():
            file.writestr(name, text)


def python_with_manager(scratch: Path) -> Path:
    """An environment that sees .venv's packages and has Manager, pip and uv of its own."""
    venv.create(scratch / "venv", with_pip=True)
    python = scratch / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    place = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(place, capture_output=True, text=True, check=True).stdout.strip())
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "zz_ours.pth").write_text(ours + "\n")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", MANAGER], check=True)
    return python


def main(scratch: Path) -> int:
    scratch.mkdir(parents=True)  # never an old one
    for name in ("served", "home", "site"):
        (scratch / name).mkdir()
    (scratch / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    shutil.copytree(find(), scratch / "ComfyUI", ignore=shutil.ignore_patterns("__pycache__", "user", "svg2*"))
    archive(scratch / "served" / "old.zip", "0.0.9", {"nodes/gone.py": "", "svg2_core/gone/__init__.py": ""})
    archive(scratch / "served" / "new.zip", "0.1.0", {})
    git("init", "--quiet", "--bare", str(scratch / "ComfyUI-SVG2.git"))
    for name in tracked_files():
        (scratch / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, scratch / "work" / name)
    git("init", "--quiet", cwd=scratch / "work")
    git("add", "--all", cwd=scratch / "work")
    git("commit", "--quiet", "--message", "one", cwd=scratch / "work")
    git("push", "--quiet", str(scratch / "ComfyUI-SVG2.git"), "HEAD", cwd=scratch / "work")

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(scratch / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HOME": str(scratch / "home"),
            "PYTHONPATH": str(scratch / "site"),
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        for name in ("PYTHONDONTWRITEBYTECODE", "XDG_CACHE_HOME", "COMFYUI_PATH"):
            environment.pop(name, None)
        steps, address = HERE / "manager_steps.py", f"http://127.0.0.1:{server.server_port}/"
        return subprocess.run([str(python_with_manager(scratch)), str(steps), str(scratch), address], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
