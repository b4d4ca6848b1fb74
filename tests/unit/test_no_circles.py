"""No file imports, by way of others, itself: a reader can start anywhere and comes to an end."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("nodes", "svg2_core", "cuda", "scripts", "tests")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, source: str, known: set[str]) -> set[str]:
    """The modules of this project that a file imports, wherever in it, and not only for types."""
    module, found = module_of(path), set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            named = [".".join([*base, alias.name]) for alias in node.names]
            found |= {name if name in known else ".".join(base) for name in named}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & known) - {module}


def graph(files: dict[Path, str]) -> dict[str, set[str]]:
    known = {module_of(path) for path in files}
    return {module_of(path): imports_of(path, source, known) for path, source in files.items()}


def test_no_file_imports_itself():
    files = {path: path.read_text(encoding="utf-8") for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert len(files) > 200
    TopologicalSorter(graph(files)).prepare()


def test_a_circle_is_found():
    """Guards the test above: by way of a package, from within a function."""
    files = {
        ROOT / "svg2_core/a/__init__.py": "from .b import x",
        ROOT / "svg2_core/a/b.py": "def f():\n    from ..c import y",
        ROOT / "svg2_core/c.py": "from .a import x",
    }
    with pytest.raises(CycleError):
        TopologicalSorter(graph(files)).prepare()
