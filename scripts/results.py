"""What the demo makes of its two runs: numbers, videos and a picture."""

import json
import math
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from host import ROOT
from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(ROOT))
from svg2_core.metrics import psnr, rel_l2

IDENTICAL_DB = 100.0  # stands for the infinite PSNR of equal pictures, which JSON cannot hold


def read_run(folder: Path, name: str) -> tuple[torch.Tensor, dict]:
    """Frames `[F, H, W, 3]` in 0..1; SVG2's reports and the name of the host's attention, as SVG2DemoSave left them."""
    frames = torch.from_numpy(np.load(folder / f"{name}.npy"))[..., :3]
    return frames, json.loads((folder / f"{name}.json").read_text())


def capped_psnr(frames: torch.Tensor, reference: torch.Tensor) -> float:
    return min(psnr(frames, reference), IDENTICAL_DB)


def ssim(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of frames `[F, H, W, 3]` in 0..1."""
    from skimage.metrics import structural_similarity

    pairs = zip(frames.numpy(), reference.numpy(), strict=True)
    scores = [
        structural_similarity(
            x, y, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in pairs
    ]
    return float(np.mean(scores))


def merge_reports(reports: list[dict]) -> dict:
    """One report of a workflow's patched models together (Wan 2.2 has two), weighted by their calls."""
    sparse = sum(r["sparse_calls"] for r in reports)
    reasons: dict[str, int] = {}
    for report in reports:
        for reason, count in report["dense_calls"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    densities = [r["density"] * r["sparse_calls"] for r in reports if r["sparse_calls"]]
    errors = [r["error"] for r in reports if r["error"] is not None]
    return {
        "tokens": max((r["tokens"] for r in reports), default=0),
        "density": sum(densities) / sparse if sparse else None,
        "attention_error": sum(errors) / len(errors) if errors else None,
        "sparse_share": sparse / (sparse + sum(reasons.values())) if sparse else 0.0,
        "backend": next((r["backend"] for r in reports if r["backend"]), None),
        "fallbacks": reasons,
    }


def write_video(path: Path, frames: torch.Tensor, fps: float) -> None:
    """H.264 in a form every player takes: 8 bits, 4:2:0, even width and height."""
    pixels = (frames.clamp(0, 1) * 255).round().byte().numpy()
    height, width = pixels.shape[1] // 2 * 2, pixels.shape[2] // 2 * 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def side_by_side(left: torch.Tensor, right: torch.Tensor, titles: tuple[str, str]) -> torch.Tensor:
    """Two videos next to each other under a line that names them."""
    video = torch.cat((left, right), dim=2)
    line = max(16, video.shape[1] // 12) // 2 * 2
    title = Image.new("RGB", (video.shape[2], line))
    for i, text in enumerate(titles):
        ImageDraw.Draw(title).text(
            (i * left.shape[2] + line // 3, line // 8), text, fill="white", font=ImageFont.load_default(line * 0.7)
        )
    bar = torch.from_numpy(np.array(title)).float()[None] / 255
    return torch.cat((bar.expand(len(video), -1, -1, -1), video), dim=1)


def write_picture(path: Path, dense: torch.Tensor, sparse: torch.Tensor, reports: list[dict], title: str) -> None:
    """Frames of both runs, density per block and step, PSNR per frame."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = [round(i * (len(dense) - 1) / 4) for i in range(5)] if len(dense) > 4 else list(range(len(dense)))
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(title)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.05, 1))
    axes = top.subplots(2, len(shown), squeeze=False)
    for row, (name, frames) in zip(axes, (("dense", dense), ("SVG2", sparse)), strict=True):
        for axis, i in zip(row, shown, strict=True):
            axis.imshow(frames[i].clamp(0, 1).numpy())
            axis.set_xticks([], [])
            axis.set_yticks([], [])
            if name == "dense":
                axis.set_title(f"frame {i + 1}", fontsize=9)
        row[0].set_ylabel(name)

    left, right = bottom.subplots(1, 2, width_ratios=(1.6, 1))
    labels = reports[0]["block_labels"] if reports else []
    rows = [[cell for report in reports for cell in report["density_by_block_and_step"][i]] for i in range(len(labels))]
    if any(cell is not None for row in rows for cell in row):
        grid = np.array([[math.nan if cell is None else cell for cell in row] for row in rows])
        left.set_facecolor("lightgrey")
        image = left.imshow(
            grid,
            aspect="auto",
            vmin=0,
            cmap="viridis",
            interpolation="none",
            extent=(0.5, grid.shape[1] + 0.5, len(rows) - 0.5, -0.5),
        )
        bottom.colorbar(image, ax=left)
        every = max(1, len(labels) // 12)
        left.set_yticks(range(0, len(labels), every), labels[::every])
    left.set(title="density of attention (grey: dense)", xlabel="step", ylabel="block")
    left.xaxis.get_major_locator().set_params(integer=True)

    per_frame = [capped_psnr(s, d) for s, d in zip(sparse, dense, strict=True)]
    right.plot(range(1, len(per_frame) + 1), per_frame, marker="o", markersize=3)
    right.set(title="PSNR against dense (dB)", xlabel="frame")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


__all__ = ["capped_psnr", "merge_reports", "read_run", "rel_l2", "side_by_side", "ssim", "write_picture", "write_video"]
