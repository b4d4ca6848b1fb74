"""Write the graphs of workflows/ and their API twins anew: `python scripts/build_workflows.py`.

The recipes are in scripts/workflows/recipes.py; the pictures beside the graphs are made by build_thumbnails.py.
workflows/demo_wan.json and demo_wan_small.json, the demo's own, are written by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import environment
import host
from host import ROOT

FOLDER = ROOT / "workflows"


def write(folder: Path, object_info: dict) -> list[Path]:
    """Write every workflow and its twin under `folder`; the same bytes every time. -> the files"""
    from workflows.recipes import RECIPES, build

    (folder / "api").mkdir(parents=True, exist_ok=True)
    written = []
    for name in RECIPES:
        graph = build(name, object_info)
        for path, content in (
            (folder / f"{name}.json", graph.editor()),
            (folder / "api" / f"{name}.json", graph.api()),
        ):
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
            written.append(path)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", metavar="PATH", help="a ComfyUI folder to use (default: found or fetched)")
    comfyui = environment.ensure(parser.parse_args().comfyui)
    host.activate(comfyui)
    from workflows.host_nodes import load, object_info

    load()
    for path in write(FOLDER, object_info()):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    host.guarded(main)
