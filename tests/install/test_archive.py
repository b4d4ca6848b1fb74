"""What the registry's archive has and has not, and what its pyproject.toml says, without starting anything."""

import ast
import io
import json
import re
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from manager import requirements
from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 12 * 2**20  # bytes of the zip
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)|<img[^>]+src=\"([^\"]+)\"")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_only_what_users_need(shipped):
    for name in ("__init__.py", "install.py", "requirements.txt", "pyproject.toml", "README.md", "LICENSE", "cuda/prebuilt/manifest.json"):
        assert name in shipped
    folders = {name.split("/")[0] for name in shipped if "/" in name}
    assert folders == {"cuda", "locales", "nodes", "svg2_core", "web", "workflows"}
    assert not [name for name in shipped if PurePosixPath(name).name.startswith((".", "test_", "conftest"))]
    # The demo's workflows need the demo's nodes and models, in scripts/; build.py makes the prebuilt files.
    assert not [name for name in shipped if name.startswith("workflows/demo_wan")] and "cuda/build.py" not in shipped


def test_size(shipped):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(shipped):
            archive.write(ROOT / name, name)
    assert len(buffer.getvalue()) < LARGEST


def test_every_import_of_the_pack_finds_its_file(shipped):
    """Also those inside functions, which a start of ComfyUI does not reach."""
    known = {"/".join(PurePosixPath(name).with_suffix("").parts) for name in shipped if name.endswith(".py")}
    known |= {name.removesuffix("/__init__") for name in known}
    folders = {str(parent) for name in shipped for parent in PurePosixPath(name).parents}
    for name in (name for name in shipped if name.endswith(".py")):
        for node in ast.walk(ast.parse(read(name))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            start = PurePosixPath(name).parents[node.level - 1]
            module = start / (node.module or "").replace(".", "/")
            assert str(module) in known | {"."}, f"{name}: {ast.unparse(node)}"
            for alias in node.names:  # of a package without such an attribute: a module beside it
                if str(module) in folders and str(module / alias.name) in {n.removesuffix(".py") for n in map(str, _python())}:
                    assert str(module / alias.name) in known, f"{name}: {ast.unparse(node)}"


def _python():
    """All Python files of the checkout that could be meant, shipped or not."""
    return (path.relative_to(ROOT).as_posix() for folder in ("cuda", "nodes", "svg2_core") for path in (ROOT / folder).rglob("*.py"))


def test_pictures_of_the_help_pages(shipped):
    for name in sorted(name for name in shipped if name.endswith(".md")):
        for pair in PICTURE.findall(read(name)):
            target = next(filter(None, pair))
            if "://" not in target:
                path = (ROOT / name).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
                assert path in shipped, f"{name} shows {target}, which the archive does not have"


def test_prebuilt_files(shipped):
    listed = {f"cuda/prebuilt/{entry['file']}" for entry in json.loads(read("cuda/prebuilt/manifest.json"))["files"]}
    assert listed == {name for name in shipped if name.startswith("cuda/prebuilt/")} - {"cuda/prebuilt/manifest.json"}


def test_dependencies_are_the_requirements(project):
    expected = {str(Requirement(line)) for line in requirements(ROOT)}
    assert {str(Requirement(text)) for text in project["project"]["dependencies"]} == expected


def test_what_the_registry_checks(project):
    about, comfy = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", about["name"]) and "comfy" not in about["name"] and len(about["name"]) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.]+)?", about["version"])
    assert about["license"] == {"file": "LICENSE"} and about["description"].isascii()
    assert {"PublisherId", "DisplayName", "Icon"} <= set(comfy) and comfy["DisplayName"] == "SVG2 Sparse Attention"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    accelerators = [text for text in about["classifiers"] if text.startswith("Environment ::")]
    assert accelerators == ["Environment :: GPU :: NVIDIA CUDA"]
    systems = {text for text in about["classifiers"] if text.startswith("Operating System ::")}
    assert systems == {"Operating System :: Microsoft :: Windows", "Operating System :: POSIX :: Linux"}


def test_nothing_that_the_registry_refuses(shipped):
    """eval and exec (but for methods of that name), and installing at run time."""
    for name in (name for name in shipped if name.endswith(".py")):
        for node in ast.walk(ast.parse(read(name))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"{name}:{node.lineno}"
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in modules:
                assert module.split(".")[0] not in ("subprocess", "pip", "urllib", "requests", "socket"), f"{name}: {module}"


def test_one_script_of_the_front_end_acts_by_itself(shipped):
    """ComfyUI runs every script under web/, and an update by Manager may leave old ones behind: those must do nothing.
    So the one that registers the extension keeps its name for ever, and the others only define things."""
    scripts = sorted(name for name in shipped if name.endswith(".js"))
    acting = [name for name in scripts if re.search(r"^(app|api|document|window)\b", read(name), re.MULTILINE)]
    assert acting == ["web/js/svg2.js"]


def test_the_style_sheet_is_about_the_packs_own_elements(shipped):
    """It is loaded into the page that all packs share."""
    rules = re.findall(r"([^{}]+)\{[^{}]*\}", read("web/js/svg2.css"))
    assert rules and "@" not in read("web/js/svg2.css")
    for selector in ",".join(rules).split(","):
        assert selector.strip().startswith(".svg2-"), selector
