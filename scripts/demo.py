"""Sample a video dense and with SVG2 in a real ComfyUI and compare: `python scripts/demo.py [--preset turbo] [--small] [--json]`.

Sets everything up on its first call. Without arguments it samples a model that comes with this checkout, on any machine: 12,480
tokens, five minutes on two cores of a CPU. --small: 3,120 tokens of a smaller video, half a minute. With `--workflow FILE` it runs a workflow of yours, with the models of the ComfyUI at `--comfyui PATH`: the
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
WORKFLOW, SMALL = ROOT / "workflows/demo_wan.json", ROOT / "workflows/demo_wan_small.json"
MODELS = ROOT / "scripts/demo_nodes/models"
PRESETS = ("auto", "quality", "balanced", "turbo", "paper")
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
    "dense_run_s",
    "svg2_run_s",
    "times_faster_per_step",
    "times_faster",
    "dense_attention",
    "backend",
    "fallbacks",
    "device",
    "gpu",
)
# What computes the dense run, by the name of ComfyUI's function.
DENSE = {
    "attention_sub_quad": "ComfyUI's sub-quadratic attention, its default here",
    "attention_split": "ComfyUI's split attention",
    "attention_basic": "ComfyUI's basic attention",
    "attention_pytorch": "torch's attention, ComfyUI's default here",
    "attention_sage": "SageAttention",
    "attention_flash": "flash-attn",
    "attention_xformers": "xformers",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="PATH", help="a ComfyUI folder to use (default: found or fetched)")
    parser.add_argument("--small", action="store_true", help="a small video, in half a minute: too short for SVG2 to pay")
    parser.add_argument("--preset", choices=PRESETS, help="of SVG2 (default: the workflow's own)")
    parser.add_argument("--workflow", metavar="FILE", type=Path, help="a workflow with an SVG2 Sparse Attention node")
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
    if path in (WORKFLOW, SMALL):
        [model] = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "UNETLoader"]
        if not (MODELS / model).is_file():
            raise SetupError(f"The demo's model {MODELS / model} is missing: restore it from git.")
    return workflow


def progress(name: str):
    """A printer of progress lines for one run."""
    began = time.monotonic()

    def show(kind: str, done: int, of: int) -> None:
        print(f"  {name:5}  {kind}  {done}/{of}  {time.monotonic() - began:.0f} s", flush=True)

    return show


async def sample(comfyui: Path, file: dict, base: Path, cpu: bool, preset: str | None) -> dict:
    """Run the workflow both ways on one server; the frames and reports are then under base/output."""
    import torch
    from comfy_server import Server
    from workflow import PATCH, frame_rate, prepare, to_prompt

    print("starting ComfyUI", flush=True)
    async with Server(comfyui, base, OUTPUT / "server.log", cpu) as server:
        nodes = await server.get("/object_info")
        prompt = to_prompt(file, nodes)
        for node in prompt.values():
            if preset and node["class_type"] == PATCH:
                node["inputs"]["preset"] = preset
        clocks = {}
        for name, enabled in (("dense", False), ("svg2", True)):
            clocks[name] = await server.run(prepare(prompt, nodes, enabled, name), progress(name))
        device = server.devices[0]
    per_step, run = ([getattr(clocks[name], what) for name in ("dense", "svg2")] for what in ("seconds_per_step", "run"))
    return {
        **dict(zip(("dense_s_per_step", "svg2_s_per_step"), per_step, strict=True)),
        **dict(zip(("dense_run_s", "svg2_run_s"), run, strict=True)),
        "times_faster_per_step": per_step[0] / per_step[1] if all(per_step) else None,
        "times_faster": run[0] / run[1] if all(run) else None,
        "device": f"{environment.processor()} (CPU, {torch.get_num_threads()} threads)" if device["type"] == "cpu" else device["name"],
        "gpu": None if device["type"] == "cpu" else device["name"],
        "fps": frame_rate(prompt),
    }


def write_results(folder: Path, run: dict) -> dict:
    """Compare the two runs, write every file of output/demo/, and return the table."""
    import results

    dense, by = results.read_run(folder, "dense")
    sparse, run_of_svg2 = results.read_run(folder, "svg2")
    reports = run_of_svg2["reports"]
    if dense.shape != sparse.shape:
        raise SetupError(
            f"The two runs gave videos of different sizes, {tuple(dense.shape)} and {tuple(sparse.shape)}: the workflow must not vary by itself."
        )
    quality = {
        "psnr_db": results.capped_psnr(sparse, dense),
        "ssim": results.ssim(sparse, dense),
        "rel_l2": results.rel_l2(sparse, dense),
    }
    table = {**results.merge_reports(reports), **quality, **run, "dense_attention": by["dense_attention"]}
    table = {key: table[key] for key in KEYS}

    results.write_video(OUTPUT / "dense.mp4", dense, run["fps"])
    results.write_video(OUTPUT / "svg2.mp4", sparse, run["fps"])
    density = "no sparse calls" if table["density"] is None else f"density {table['density']:.0%}"
    titles = [f"{name}{f', {seconds:.0f} s' if seconds else ''}" for name, seconds in (("dense", run["dense_run_s"]), ("SVG2", run["svg2_run_s"]))]
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
        *(
            (what, f"{number(table[f'dense_{key}'], '.2f')} s dense, {number(table[f'svg2_{key}'], '.2f')} s with SVG2: {times(table[ratio])}")
            for what, key, ratio in (("a step, after the first", "s_per_step", "times_faster_per_step"), ("the whole sampling", "run_s", "times_faster"))
        ),
        ("dense attention by", DENSE.get(table["dense_attention"], table["dense_attention"])),
        ("sparse attention by", f"backend {table['backend']}" if table["backend"] else "-"),
        ("dense calls in SVG2's run", ", ".join(f"{name} {count}" for name, count in table["fallbacks"].items()) or "none"),
        ("ran on", table["device"]),
    ]
    print()
    for name, value in rows:
        print(f"{name:32}  {value}")
    print(f"\nVideos, report.png and report.json are in {OUTPUT}", flush=True)


def times(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"


def main() -> int:
    args = parse_args()
    if args.small and args.workflow:
        raise SetupError("--small and --workflow are two demos: give one of them.")
    file = read_workflow(args.workflow or (SMALL if args.small else WORKFLOW))
    comfyui = environment.ensure(args.comfyui)

    import torch

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT, prefix="server-") as base:
        run = asyncio.run(sample(comfyui, file, Path(base), args.cpu or not torch.cuda.is_available(), args.preset))
        table = write_results(Path(base) / "output", run)
    show(table)
    if args.json:
        print(json.dumps(table))
    return 0


if __name__ == "__main__":
    host.guarded(main)
