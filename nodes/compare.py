"""Node SVG2Compare: how far a video is from another one, in numbers, in words and in a picture."""

import math
from dataclasses import dataclass

import comfy.utils
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io, ui

from ..svg2_core.metrics import psnr
from .telling.plots.strip import draw_strip
from .telling.similarity import SSIM_WINDOW, load_lpips, ssim

# dB. How far apart two dense attention backends leave a video, everything else being the same: a figure known for the models
# SVG2 is for from others' experience, not measured by this project.
NOISE_LOW, NOISE_HIGH = 27, 34


class SVG2Compare(io.ComfyNode):
    """Measures a candidate video against a reference of the same seed and shows where they differ."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVG2Compare",
            display_name="SVG2 Compare",
            category="model/patch/svg2",
            description=(
                "Compares a video with a reference of the same seed and settings, such as one made with SVG2 and one without: "
                "PSNR, SSIM and LPIPS per frame, a strip of frames with the amplified difference, and what the numbers mean."
            ),
            search_aliases=["svg2 compare", "compare videos", "psnr", "ssim", "lpips", "image difference", "video quality"],
            inputs=[
                io.Image.Input("reference", tooltip="The video to measure against: the same seed and settings without SVG2 (switch off `enabled`)."),
                io.Image.Input("candidate", tooltip="The video to be judged. It must have as many frames of the same size as the reference."),
                io.Float.Input("amplify", optional=True, default=8.0, min=1.0, max=100.0, step=0.5,
                    tooltip="How many times the difference is amplified in the picture. It does not change the numbers."),
                io.Int.Input("frames", optional=True, default=4, min=1, max=16, tooltip="Columns of the strip: frames spread evenly from the first to the last."),
            ],
            outputs=[
                io.Image.Output("strip", tooltip="Reference, candidate and amplified difference, one row each."),
                io.Float.Output("psnr", tooltip="Peak signal-to-noise ratio over the whole video, in dB; infinite where the videos are identical."),
                io.Float.Output("ssim", tooltip="Structural similarity, the mean over the frames; 1 where the videos are identical."),
                io.String.Output("report", tooltip="Verdict and numbers as text."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, reference, candidate, amplify=8.0, frames=4) -> io.NodeOutput:
        check(reference, candidate)
        scores = measure(reference, candidate)
        captions = [f"frame {i + 1}: {decibel(db)}" for i, db in enumerate(scores.psnr)]
        strip = draw_strip(reference, candidate, amplify, frames, captions).tensor()
        text = "\n".join([verdict(scores), *lines(scores, reference)])
        shown = {**ui.PreviewImage(strip, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(strip, scores.overall_psnr, mean(scores.ssim), text, ui=shown)


@dataclass(frozen=True)
class Scores:
    """One number per frame. psnr: dB, infinite for equal frames.

    lpips: empty where it was not computed, and then why_no_lpips says why; broken: by input, the frames (from 1) with
    values that are not finite. All numbers of such a frame are NaN.
    """

    psnr: list[float]
    ssim: list[float]
    lpips: list[float]
    why_no_lpips: str
    broken: dict[str, list[int]]

    @property
    def overall_psnr(self) -> float:
        """Over all pixels of the video: the mean of the frames' errors, in dB."""
        error = mean([10 ** (-db / 10) for db in self.psnr])
        return math.inf if error == 0 else -10 * math.log10(error)


def check(reference: torch.Tensor, candidate: torch.Tensor) -> None:
    """ValueError naming the inputs where the two are not `[F, H, W, C]` of the same shape, or too small for SSIM."""
    if reference.shape != candidate.shape:
        raise ValueError(
            f"reference and candidate must have as many frames of the same size: reference is {size(reference)}, "
            f"candidate is {size(candidate)}"
        )
    if len(reference) == 0 or min(reference.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"reference and candidate must have at least one frame of {SSIM_WINDOW}x{SSIM_WINDOW} pixels: they are {size(reference)}"
        )


def size(images: torch.Tensor) -> str:
    frames, height, width, channels = images.shape
    return f"{frames} frame{'s' * (frames != 1)} of {width}x{height} pixels, {channels} channels, shape {tuple(images.shape)}"


def measure(reference: torch.Tensor, candidate: torch.Tensor) -> Scores:
    """Compare `[F, H, W, C]` in 0..1 on the device they are on, frame by frame: memory for one, however many there are."""
    lpips = load_lpips(reference[0])
    scores = Scores([], [], [], lpips if isinstance(lpips, str) else "", {})
    metrics = [(psnr, scores.psnr), (ssim, scores.ssim)] + ([] if scores.why_no_lpips else [(lpips, scores.lpips)])
    progress = comfy.utils.ProgressBar(len(reference))
    for i, (x, y) in enumerate(zip(candidate, reference, strict=True)):
        throw_exception_if_processing_interrupted()
        broken = [name for name, frame in (("reference", y), ("candidate", x)) if not frame.isfinite().all()]
        for name in broken:
            scores.broken.setdefault(name, []).append(i + 1)
        for metric, values in metrics:
            values.append(math.nan if broken else metric(x, y))
        progress.update(1)
    return scores


def verdict(scores: Scores) -> str:
    """What the numbers mean, in one sentence."""
    if scores.broken:
        where = "; ".join(f"{name}, frame {some(frames)}" for name, frames in scores.broken.items())
        return f"not comparable: values that are not numbers (NaN or infinite) in {where}. Sampling or decoding failed there"
    db, low = scores.overall_psnr, scores.psnr.index(min(scores.psnr)) + 1
    if db == math.inf:
        return (
            "identical: every pixel is equal. So it is where SVG2 was switched off or every call ran dense (see SVG2 Report); "
            "if you expected a difference, check that the two inputs come from two runs"
        )
    if db >= NOISE_HIGH:
        return (
            f"{decibel(db)}: closer than two dense attention backends are to each other ({NOISE_LOW}-{NOISE_HIGH} dB)"
        )
    if db >= NOISE_LOW:
        return f"{decibel(db)}: within the noise between two dense attention backends ({NOISE_LOW}-{NOISE_HIGH} dB)"
    return (
        f"{decibel(db)}: visible differences are possible, most of all in frame {low}. Two dense attention backends differ by "
        f"{NOISE_LOW}-{NOISE_HIGH} dB. A higher density, more warmup_steps or preset quality come closer; if it is another picture "
        "altogether, check that seed, prompt and steps are the same"
    )


def lines(scores: Scores, reference: torch.Tensor) -> list[str]:
    """The numbers: over the whole video, and frame by frame."""
    what = size(reference).partition(", shape")[0] + f"; measured on {reference.device.type}"
    if scores.overall_psnr == math.inf:
        return [what]
    found = [
        what,
        f"PSNR {decibel(scores.overall_psnr)} over all, lowest {lowest(scores.psnr, decibel)}",
        f"SSIM {similarity(mean(scores.ssim))} mean, lowest {lowest(scores.ssim, similarity)}",
    ]
    if scores.lpips:
        worst = max(range(len(scores.lpips)), key=scores.lpips.__getitem__)
        found.append(
            f"LPIPS {mean(scores.lpips):.4f} mean, highest {scores.lpips[worst]:.4f} in frame {worst + 1} (0 is equal)"
        )
    else:
        found.append(f"LPIPS not computed: {scores.why_no_lpips}")
    for i, (db, alike) in enumerate(zip(scores.psnr, scores.ssim, strict=True)):
        row = f"frame {i + 1}: PSNR {decibel(db)}, SSIM {similarity(alike)}"
        found.append(row + (f", LPIPS {scores.lpips[i]:.4f}" if scores.lpips else ""))
    return found


def decibel(db: float) -> str:
    return "unknown" if math.isnan(db) else "equal" if db == math.inf else f"{db:.1f} dB"


def similarity(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.4f}"


def lowest(values: list[float], words) -> str:
    """The smallest of the numbers with its frame; frames that have none are left out."""
    i = min((i for i, v in enumerate(values) if not math.isnan(v)), key=values.__getitem__, default=None)
    return "unknown" if i is None else f"{words(values[i])} in frame {i + 1}"


def some(numbers: list[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (f" and {len(numbers) - most} more" if len(numbers) > most else "")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
