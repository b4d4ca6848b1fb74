"""The notes in the graphs: what to download, what SVG2 does and says, what one may change. No promises of speed."""

import math
import re
from itertools import groupby

from .files import ModelFile

LEAST_TOKENS = 8192  # min_tokens at auto: shorter videos stay dense
START_IMAGE = "Choose a start image of your own: the example only shows that it works."


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


def few_steps(count: str) -> str:
    return f"""**Few steps.** All {count} run sparse. Each step decides much of the picture: compare it with *enabled* off before you keep it; *quality* comes closer, and *warmup_steps* 1 keeps the first step dense."""


UNTRIED = "**Not tried yet with its real weights.** Nodes, links and settings are checked, what comes out is not: compare it with *enabled* off."


def ltx25(version: str) -> str:
    """version: the least host that can load it, newer than the one that this pack was written for."""
    return f"""**ComfyUI {version} or newer.** Older ones open this graph, for its nodes are older than the model, but cannot load the model.

**A licence.** The files can be downloaded once you have agreed to it on the page of [LTX-2.5](https://huggingface.co/Lightricks/LTX-2.5), logged in."""


def minimax(from_image: bool) -> str:
    """MiniMax-H3's sizes, and which of its tokens are not clustered."""
    exact = "The tokens of prompt, sound and start image" if from_image else "The tokens of prompt and sound"
    image = f"{START_IMAGE} It is stretched to the size. " if from_image else ""
    bypassed = "Bypass it (Ctrl+B) to make a video from the prompt alone." if from_image else ""
    own = video_tokens(1344, 768, 124, 32, five_of_17)
    texts = (
        f"**Other sizes.** *width* and *height* in steps of 32; the model's own size is 1344 x 768, with {own:,} tokens. *length* is 17 n + 5, at least 124 in training. {exact} always stay exact, in both directions.",
        image + bypassed,
        UNTRIED,
    )
    return "\n\n".join(filter(None, texts))


# Frames of the latent, from frames of the video: Wan's, HunyuanVideo's and Cosmos' VAE, LTX's, MiniMax-H3's.
def by_four(length: int) -> int:
    return (length - 1) // 4 + 1


def by_eight(length: int) -> int:
    return (length - 1) // 8 + 1


def five_of_17(length: int) -> int:
    return (length - 5) // 17 * 5 + 2


def size(
    width: int, height: int, length: int, fps: int | None, spatial: int = 16, frames=by_four, more: str = "",
    half: bool = False, tiled: bool = True,
) -> str:  # fmt: skip
    """What this size means for SVG2, and what to do when memory is short.

    fps: None if it is not the workflow's to say
    spatial: pixels along the side of a token
    frames: frames of the latent, from those of the video
    half: the model's file is in 16 bits, so the loader can make it smaller
    tiled: decoding in tiles needs less memory, for the VAE does not do so by itself
    """
    ways = ["Reduce *length* or the size first"]
    if half:
        ways.append("then *weight_dtype* fp8_e4m3fn in the loader")
    if tiled:
        ways.append("or take *VAE Decode (Tiled)* if it happens while decoding")
    tokens = video_tokens(width, height, length, spatial, frames)
    rate = f" at {fps} fps" if fps else ""
    assert tokens >= LEAST_TOKENS
    text = f"""**{width} x {height}, {length} frames{rate}: {tokens:,} video tokens.** Attention's cost grows with their square, so the larger the video, the more there is for SVG2 to leave out. Below {LEAST_TOKENS:,} tokens it stays dense (*short_sequence*): nothing to gain there.

**Out of memory?** {", ".join(ways)}. SVG2 itself keeps at most 512 MiB of cluster centres while it samples."""
    return "\n\n".join(filter(None, (text, more)))


def video_tokens(width: int, height: int, length: int, spatial: int, frames) -> int:
    return frames(length) * (height // spatial) * (width // spatial)


def two_stages(width: int, height: int, length: int, fps: int) -> str:
    """LTX's size: a video of half the size, then the whole one. Only the last one is worth SVG2's while here."""
    first = video_tokens(width // 2, height // 2, length, 32, by_eight)
    last = video_tokens(width, height, length, 32, by_eight)
    larger = video_tokens(1920, 1088, length, 32, by_eight)
    assert first < LEAST_TOKENS <= last
    return f"""**{width} x {height}, {length} frames at {fps} fps, in two stages.** The first makes half the size, {first:,} video tokens: fewer than {LEAST_TOKENS:,}, so it stays dense (*short_sequence*); nothing to gain there. The last one, twice as wide and high, has {last:,} and runs sparse. The larger the video, the more there is for SVG2 to leave out: at 1920 x 1088 the last stage has {larger:,}.

**To change it**: *Half the size* takes half of what *Start image, whole size* takes; the whole size in steps of 64, *Frames* in steps of 8. Out of memory: reduce these first. SVG2 itself keeps at most 512 MiB of cluster centres while it samples.

**One SVG2 node for both stages**, for they share one model. Its line follows the stage that runs; the report is of the last one.

{START_IMAGE} At CFG 1 the negative prompt is not used.

{UNTRIED}"""


def animate(tutorial: str) -> str:
    """Wan 2.2 Animate: what goes in. tutorial: where its examples are."""
    return f"""**Looks from an image, motion from a video.** Choose both: *Character* and *Driving video*; ComfyUI's [tutorial]({tutorial}) has examples. Of a longer video the first *length* frames are taken; the last pose of a shorter one is held. The frame rate and the sound are the video's.

**Pose and face** come from ComfyUI's own SDPose nodes, which look for one person: the pose is drawn, the face cut out. ComfyUI's template for this model has nodes of three other packs in their place.

**To replace the person in the video instead**, connect *background_video* and *character_mask* too, the mask from a node that segments videos. As it is here, only the motion is taken."""


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
