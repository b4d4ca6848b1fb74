"""svg2_core needs no ComfyUI, no fixed name, no place on the path; and its imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "svg2_core"
FILES = sorted(CORE.rglob("*.py"))

# What the core may import by absolute name, besides the standard library.
ALLOWED = {"torch", "triton", "einops"}

RUN = """
import torch
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 60, 16)
config = core.SVG2Config(q_clusters=3, k_clusters=6, min_tokens=0)
result = core.svg2_attention(q, k, v, core.Layout(4, 50), config)
assert result.out.shape == q.shape and result.out.isfinite().all()
assert 0 < result.density.item() <= 1
assert core.preset_config("auto", "wan_t2v").top_p > 0
host = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "server", "nodes", "folder_paths", "execution"}
assert not host & {name.split(".")[0] for name in sys.modules}
print("ran")
"""

BY_NAME = """
import sys
sys.path.insert(0, sys.argv[1])
import svg2_core as core
"""

BY_LOCATION = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location(
    "zebra-1_x_0", Path(sys.argv[1]) / "svg2_core" / "__init__.py",
    submodule_search_locations=[str(Path(sys.argv[1]) / "svg2_core")],
)
core = importlib.util.module_from_spec(spec)
sys.modules["zebra-1_x_0"] = core
spec.loader.exec_module(core)
assert "svg2_core" not in sys.modules
"""


@pytest.mark.parametrize("load", [BY_NAME, BY_LOCATION], ids=["by_name", "by_location"])
def test_runs_alone(load, tmp_path):
    """In a fresh, isolated interpreter, started elsewhere."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", load + RUN, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ran"


def imports(file: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement and every import by a call, anywhere in the file."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("__import__", "import_module") and node.args and isinstance(node.args[0], ast.Constant):
                found.append((0, node.args[0].value))
    return found


def test_the_check_sees_files_and_imports():
    assert len(FILES) >= 15
    assert (0, "torch") in imports(CORE / "attention.py") and (1, "config") in imports(CORE / "attention.py")
    assert (2, "layout") not in imports(CORE / "attention.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(CORE).as_posix())
def test_imports_point_one_way(file):
    """Outside the core lie only the standard library, torch, triton, einops, and the pack's own `cuda` room."""
    depth = len(file.relative_to(CORE).parts)  # dots that still stay inside the core
    for level, module in imports(file):
        top = module.split(".")[0]
        if level == 0:
            assert top in ALLOWED or top in sys.stdlib_module_names, f"{file.name} imports {module}"
        elif level > depth:
            assert level == depth + 1 and top == "cuda", f"{file.name} imports {'.' * level}{module}"
