"""The notes in the graphs: what to download, what SVG2 does and says, what one may change. No promises of speed."""

import math
import re
from itertools import groupby

from .files import ModelFile

LEAST_TOKENS = 8192  # min_tokens at auto: shorter videos stay dense


def files(wanted: list[ModelFile]) -> str:
    """Where each file goes, with its address."""
    lines = [
        "If a file is missing, ComfyUI says so as this workflow opens and can download it. By hand, they go into:",
        "",
    ]
    by_folder = sorted(wanted, key=lambda file: file.directory)
    for folder, members in groupby(by_folder, key=lambda file: file.directory):
        lines += [f"**models/{folder}**", ""]
        lines += [f"- [{file.name}]({file.url})" for file in members] + [""]
    return "\n".join(lines).strip()


def svg2(after: str) -> str:
    """Beside the node: what it does, what it says, what to change. after: what stands before it in this graph."""
    return f"""**What it does.** The model's video self-attention runs sparse: tokens are grouped by meaning, the pairs of groups that matter are computed exactly, and what is known of the others stands in for them. It stands after {after}, last before the sampler. Leave everything on auto to begin with.

**What it says.** While it samples, the node shows one line and a bar for each block; after the run the totals: the *density* (share of token pairs computed exactly), the *attention error* (how far attention was from dense, measured on a few exact rows), and the share of calls that ran sparse. A warning says why anything ran dense, or otherwise than asked. *SVG2 Report* shows it in plots.

**What to change.** *preset*: *quality* is closest to dense, *turbo* does the least work. *enabled* off: the model as it was, to compare; the seed is fixed for that.

**Not what you expected?** The node *SVG2 Doctor* says which backends work on this machine, and why others do not."""


EXPERTS = """**Two experts, two nodes.** The high-noise model makes the first steps, the low-noise model the rest. Each has its own SVG2 node, because each patches one model and counts for itself; give both the same preset.

**Warm-up.** At auto no step stays dense. If the layout of the video strays from the dense one, give the high-noise node *warmup_steps* 1 or 2; the low-noise node continues a video that has its layout and needs none.

**What they say.** One report for each: density, attention error, sparse calls, and why others were dense, if any were. *enabled* off on both: the models as they were, to compare.

**What to change.** *preset*, on both nodes the same: *quality* is closest to dense, *turbo* does the least work. If one of the reports is not what you expected, the node *SVG2 Doctor* says which backends work on this machine, and why others do not."""

FOUR_STEPS = """**Few steps.** All four run sparse. Each step decides much of the picture: compare it with *enabled* off before you keep it; *quality* comes closer, and *warmup_steps* 1 keeps the first step dense."""


def size(width: int, height: int, length: int, fps: int, spatial: int = 16, more: str = "", half: bool = False) -> str:
    """What this size means for SVG2, and what to do when memory is short.

    spatial: pixels along the side of a token; half: the model's file is in 16 bits, so the loader can make it smaller.
    """
    smaller = "then *weight_dtype* fp8_e4m3fn in the loader, " if half else ""
    tokens = video_tokens(width, height, length, spatial)
    assert tokens >= LEAST_TOKENS
    text = f"""**{width} x {height}, {length} frames at {fps} fps: {tokens:,} video tokens.** Attention's cost grows with their square, so the larger the video, the more there is for SVG2 to leave out. Below {LEAST_TOKENS:,} tokens it stays dense (*short_sequence*): nothing to gain there.

**Out of memory?** Reduce *length* or the size first, {smaller}or take *VAE Decode (Tiled)* if it happens while decoding. SVG2 itself keeps at most 512 MiB of cluster centres while it samples."""
    return "\n\n".join(filter(None, (text, more)))


def video_tokens(width: int, height: int, length: int, spatial: int) -> int:
    """Four frames make one in the latent, after the first."""
    return ((length - 1) // 4 + 1) * (height // spatial) * (width // spatial)


COMPARE = """**The same seed twice**: once by the model as it is, once with SVG2. *SVG2 Compare* measures how far apart the two videos are and says how to read it; the picture shows reference, candidate and the difference, amplified.

The difference is one of detail, not of quality: change the preset and see what it costs. Queued again, only what depends on your change is sampled anew.

To compare with another model, put its nodes between the loaders and the two samplers, the same for both."""


def height(text: str, width: int) -> int:
    """Of a note that shows all of `text`, in the renderer that needs more room (Nodes 2.0), with a little to spare."""
    per_line = (width - 26) / 5.1  # characters of the editor's font
    total = 34.0
    for paragraph in text.split("\n"):
        shown = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", paragraph).replace("*", "")
        total += 16 * math.ceil(len(shown) / (per_line - 6 * shown.startswith("- "))) if shown else 8
    return math.ceil(total / 10) * 10
