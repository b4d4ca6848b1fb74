"""Each way to get the pack, against the real server: all of it is there, and after it is gone none of it."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

from front_end import Sight, complaints, look, mentions, nodes_of
from manager import install_script
from yarl import URL

REGISTRY_NAME = "svg2-sparse-attention"  # the folder that Manager makes: the pack's name in the registry

# A version before this one, with files that this one has no more: Manager's update on Windows leaves those behind.
OLD = {
    "__init__.py": "from .nodes import NODE_CLASS_MAPPINGS\nWEB_DIRECTORY = 'web'\n",
    "nodes/__init__.py": "from .gone import NODE_CLASS_MAPPINGS\n",
    "nodes/gone.py": "NODE_CLASS_MAPPINGS = {'SVG2Gone': object}\n",
    "web/js/gone.js": "export const gone = true;\n",
    "locales/en/nodeDefs.json": '{"SVG2Gone": {"display_name": "Gone"}}',
    "workflows/gone.json": "{}",
    "pyproject.toml": '[project]\nname = "svg2-sparse-attention"\nversion = "0.0.9"\n',
    ".cache/install_status.json": '{"format": 0, "version": "0.0.9", "gpus": "none"}',
}


def expect_all(sight: Sight, log: str, pack: Path) -> None:
    """Every node, script, help page, translation and template of this folder of custom_nodes, and no complaint."""
    assert complaints(log) == [] and sight.missing == []
    assert sight.nodes == dict.fromkeys(nodes_of(pack), f"custom_nodes.{pack.name}")
    assert {address.rsplit("/js/")[1] for address in sight.scripts} == names(pack / "web" / "js", ".js")
    assert len(sight.scripts) == len(names(pack / "web" / "js", ".js")), "a script is run twice"
    assert set(sight.words) == names(pack / "locales", "")
    assert all(set(words["nodeDefs"]) >= set(sight.nodes) for words in sight.words.values())
    assert {folder: set(found) for folder, found in sight.templates.items()} == {
        pack.name: {name.removesuffix(".json") for name in names(pack / "workflows", ".json")}
    }
    assert sight.help == {node: (pack / f"web/docs/{node}.md").read_text(encoding="utf-8") for node in sight.nodes}


def names(folder: Path, ending: str) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.endswith(ending)}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_life_of_an_installation(install, shipped, ask, base):
    """From the registry: updated, disabled, enabled, used, uninstalled."""
    custom_nodes, home = base / "custom_nodes", base.parent / "home"
    pack = custom_nodes / REGISTRY_NAME
    for name, text in OLD.items():
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        (pack / name).write_text(text, encoding="utf-8")
    install(shipped, REGISTRY_NAME)
    assert install_script(pack).returncode == 0
    status = json.loads((pack / ".cache" / "install_status.json").read_text())
    assert status["format"] == 1 and status["version"] != "0.0.9"

    disabled = custom_nodes / ".disabled" / f"{REGISTRY_NAME}@0_1_0"
    disabled.parent.mkdir()
    shutil.move(pack, disabled)
    sight, log = ask(look)
    assert sight == Sight() and complaints(log) == [] and mentions(log, pack, disabled.parent) == []

    shutil.move(disabled, pack)

    async def questions(server):
        sight = await look(server)
        await server.run({"1": {"class_type": "SVG2Doctor", "inputs": {"measure": False}}}, lambda *_: None)
        return sight

    sight, log = ask(questions)
    expect_all(sight, log, pack)
    assert mentions(log), "the Doctor tests kernels, and the log says so"
    assert len(mentions(log, pack)) > len(mentions(log)), "ComfyUI's list of import times"

    shutil.rmtree(pack)
    assert not list(custom_nodes.rglob("*svg2*")) and files(home) == set()
    assert files(base) == {"paths.yaml", "server.log", "comfyui.db", "comfyui.db.lock"}


def test_zip_of_the_repository_in_a_folder_of_another_name(install, tracked, ask):
    """With all that an address can have trouble with: a dot (GitHub's zip of a release), a space, brackets, any letter."""
    pack = install(tracked, "SVG2-0.1.0 Kopie für 木 (1)")
    own = [f"/{folder}/{quote(pack.name)}/" for folder in ("extensions", "api/workflow_templates")]
    beside = ["..%2Finstall.py", "..%5Cinstall.py", "%2E%2E/install.py", "js/..%2F..%2Finstall.py", "%2Fetc%2Fpasswd", "js"]

    async def questions(server):
        return await look(server), [await status(server, folder + path) for folder in own for path in beside]

    (sight, refused), log = ask(questions)
    expect_all(sight, log, pack)
    assert set(refused) == {404}


async def status(server, path: str) -> int:
    async with server.session.get(URL(server.url + path, encoded=True)) as response:
        return response.status


def test_git_clone_and_pull(tracked, install, ask, base, tmp_path):
    """The checkout stays clean, whatever was run in it, or an update by Manager or by hand would stop."""
    origin, clone = tmp_path / "origin", base / "custom_nodes" / "ComfyUI-SVG2"
    shutil.move(install(tracked, "origin"), origin)

    def git(folder: Path, *command: str) -> str:
        options = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(["git", *options, *command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    git(origin, "init", "--quiet")
    git(origin, "add", "--all")
    git(origin, "commit", "--quiet", "--message", "one")
    git(base, "clone", "--quiet", str(origin), str(clone))
    assert install_script(clone).returncode == 0
    sight, log = ask(look)
    expect_all(sight, log, clone)

    assert (clone / "nodes" / "__pycache__").is_dir() and (clone / ".cache").is_dir()  # what running it left
    assert git(clone, "status", "--porcelain") == ""
    (origin / "nodes" / "doctor.py").unlink()
    (origin / "pyproject.toml").write_text('version = "9.9.9"\n', encoding="utf-8")
    git(origin, "commit", "--quiet", "--all", "--message", "two")
    git(clone, "pull", "--quiet", "--ff-only")
    assert not (clone / "nodes" / "doctor.py").exists()
    assert install_script(clone).returncode == 0
    assert json.loads((clone / ".cache" / "install_status.json").read_text())["version"] == "9.9.9"
