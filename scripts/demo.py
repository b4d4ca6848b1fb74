"""Sample a video dense and with SVG2 in a real ComfyUI and compare: `python scripts/demo.py [--json]`.

Sets everything up on its first call. Without arguments it samples the small model that comes with this checkout, on any
machine. With `--workflow FILE` it runs a workflow of yours, with the models of the ComfyUI at `--comfyui PATH`: the
server runs in this checkout's own .venv, sees that ComfyUI's models and inputs and none of its other custom nodes, and
leaves its settings, queue and outputs alone. The results go to output/demo/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

import environment
import host
from host import ROOT, SetupError

OUTPUT = ROOT / "output/demo"
WORKFLOW = ROOT / "workflows/demo_wan.json"
CHECKPOINT = ROOT / "scripts/demo_nodes/models/svg2_demo_wan.safetensors"
KEYS = (
    "tokens",
    "density",
    "attention_error",
    "sparse_share",
    "psnr_db",
    "ssim",
    "rel_l2",
    "dense_s_per_step",
    "svg2_s_per_step",
    "backend",
    "fallbacks",
    "gpu",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="PATH", help="a ComfyUI folder to use (default: found or fetched)")
    parser.add_argument(
        "--workflow", metavar="FILE", type=Path, default=WORKFLOW, help="a workflow with an SVG2 Sparse Attention node"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use the GPU")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object on the last line")
    return parser.parse_args()


def read_workflow(path: Path) -> dict:
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise SetupError(f"The workflow {path} cannot be read: give the path of a workflow's JSON file.") from None
    except ValueError:
        raise SetupError(f"{path} is not JSON: give a workflow saved by ComfyUI.") from None
    if workflow.get("definitions", {}).get("subgraphs"):
        raise SetupError(f"{path} has subgraphs: save it with ComfyUI's Export (API), and give that file.")
    if path == WORKFLOW and not CHECKPOINT.is_file():
        raise SetupError(f"The demo's model {CHECKPOINT} is missing: restore it from git.")
    return workflow


def progress(name: str):
    """A printer of progress lines for one run."""
    began = time.monotonic()

    def show(kind: str, done: int, of: int) -> None:
        print(f"  {name:5}  {kind}  {done}/{of}  {time.monotonic() - began:.0f} s", flush=True)

    return show


async def sample(comfyui: Path, file: dict, base: Path, cpu: bool) -> dict:
    """Run the workflow both ways on one server; the frames and reports are then under base/output."""
    from comfy_server import Server
    from workflow import frame_rate, prepare, to_prompt

    print("starting ComfyUI", flush=True)
    async with Server(comfyui, base, OUTPUT / "server.log", cpu) as server:
        nodes = await server.get("/object_info")
        prompt = to_prompt(file, nodes)
        clocks = {}
        for name, enabled in (("dense", False), ("svg2", True)):
            clocks[name] = await server.run(prepare(prompt, nodes, enabled, name), progress(name))
        device = server.devices[0]
    return {
        "dense_s_per_step": clocks["dense"].seconds_per_step,
        "svg2_s_per_step": clocks["svg2"].seconds_per_step,
        "gpu": None if device["type"] == "cpu" else device["name"],
        "fps": frame_rate(prompt),
    }


def write_results(folder: Path, run: dict) -> dict:
    """Compare the two runs, write every file of output/demo/, and return the table."""
    import results

    dense, _ = results.read_run(folder, "dense")
    sparse, reports = results.read_run(folder, "svg2")
    if dense.shape != sparse.shape:
        raise SetupError(
            f"The two runs gave videos of different sizes, {tuple(dense.shape)} and {tuple(sparse.shape)}: the workflow must not vary by itself."
        )
    quality = {
        "psnr_db": results.capped_psnr(sparse, dense),
        "ssim": results.ssim(sparse, dense),
        "rel_l2": results.rel_l2(sparse, dense),
    }
    table = {**results.merge_reports(reports), **quality, **run}
    table = {key: table[key] for key in KEYS}

    results.write_video(OUTPUT / "dense.mp4", dense, run["fps"])
    results.write_video(OUTPUT / "svg2.mp4", sparse, run["fps"])
    density = "no sparse calls" if table["density"] is None else f"density {table['density']:.0%}"
    titles = ("dense", f"SVG2, {density}")
    results.write_video(OUTPUT / "side_by_side.mp4", results.side_by_side(dense, sparse, titles), run["fps"])
    title = f"SVG2 against dense: {table['tokens']:,} tokens, {density}, {table['psnr_db']:.1f} dB"
    results.write_picture(OUTPUT / "report.png", dense, sparse, reports, title)
    (OUTPUT / "report.json").write_text(json.dumps({**table, "runs": reports}, indent=1) + "\n")
    return table


def show(table: dict) -> None:
    def number(value, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        ("tokens", number(table["tokens"], ",")),
        ("density of the sparse calls", number(table["density"], ".1%")),
        ("attention error of those calls", number(table["attention_error"], ".1%")),
        ("share of calls that were sparse", number(table["sparse_share"], ".1%")),
        ("PSNR against dense", number(table["psnr_db"], ".1f") + " dB"),
        ("SSIM against dense", number(table["ssim"], ".4f")),
        ("relative L2 against dense", number(table["rel_l2"], ".4f")),
        ("seconds per step, dense", number(table["dense_s_per_step"], ".3f")),
        ("seconds per step, SVG2", number(table["svg2_s_per_step"], ".3f")),
        ("backend", table["backend"] or "-"),
        ("dense calls by reason", ", ".join(f"{name} {count}" for name, count in table["fallbacks"].items()) or "none"),
        ("GPU", table["gpu"] or "none"),
    ]
    print()
    for name, value in rows:
        print(f"{name:32}  {value}")
    if table["gpu"] is None:
        print(
            "\nThis ran on the CPU: the speed here means nothing. SVG2 is made for GPUs; only the picture can be judged here."
        )
    print(f"\nVideos, report.png and report.json are in {OUTPUT}", flush=True)


def main() -> int:
    args = parse_args()
    file = read_workflow(args.workflow)
    comfyui = environment.ensure(args.comfyui)

    import torch

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT, prefix="server-") as base:
        run = asyncio.run(sample(comfyui, file, Path(base), args.cpu or not torch.cuda.is_available()))
        table = write_results(Path(base) / "output", run)
    show(table)
    if args.json:
        print(json.dumps(table))
    return 0


if __name__ == "__main__":
    host.guarded(main)
