"""The demo's nodes. They stand where a text encoder, a VAE and a save node stand in a normal Wan workflow."""

import json
from pathlib import Path

import comfy.latent_formats
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.latest import ComfyExtension, io
from PIL import Image

from . import codec
from .decoder import decode
from .prompt import PROMPTS, prompt_vector

CATEGORY = "model/patch/svg2/demo"
START_FRAME = Path(__file__).parent / "bunny.png"
# Wan's latent has one pixel for 8x8 of the video's and one frame for 4; the codec's one for 4x4 and one for 1.
SPATIAL, TEMPORAL = 8, 4

Stats = io.Custom("SVG2_STATS")


class DemoStartFrame(io.ComfyNode):
    """The frame the demo's video starts from."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVG2DemoStartFrame",
            display_name="SVG2 Demo Start Frame",
            category=CATEGORY,
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        pixels = np.asarray(Image.open(START_FRAME).convert("RGB"), dtype=np.float32) / 255
        return io.NodeOutput(torch.from_numpy(pixels)[None])


class DemoConditioning(io.ComfyNode):
    """Image-to-video conditioning for the demo checkpoint, laid out as WanImageToVideo lays it out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVG2DemoConditioning",
            display_name="SVG2 Demo Conditioning",
            category=CATEGORY,
            inputs=[
                io.Combo.Input("prompt", options=list(PROMPTS)),
                io.Int.Input("width", default=320, min=16, max=4096, step=16),
                io.Int.Input("height", default=192, min=16, max=4096, step=16),
                io.Int.Input("length", default=49, min=1, max=4096, step=4),
                io.Image.Input("start_image", optional=True),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def execute(cls, prompt, width, height, length, start_image=None) -> io.NodeOutput:
        shape = [1, codec.CHANNELS, (length - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL]
        image = {}
        if start_image is not None:
            size = (shape[4] * codec.BLOCK, shape[3] * codec.BLOCK)
            frame = comfy.utils.common_upscale(
                start_image[:1, ..., :3].movedim(-1, 1), *size, "area", "center"
            ).movedim(1, -1)
            given = torch.zeros(shape)
            given[:, :, :1] = codec.encode(frame.cpu())
            mask = torch.ones([1, 1, *shape[2:]])
            mask[:, :, 0] = 0  # the host's convention: 0 = given
            # The codec's latents are in the model's own space already; the host is going to normalise what it gets.
            image = {"concat_latent_image": comfy.latent_formats.Wan21().process_out(given), "concat_mask": mask}
        positive, negative = ([[prompt_vector(text), dict(image)]] for text in (prompt, ""))
        return io.NodeOutput(positive, negative, {"samples": torch.zeros(shape)})


class DemoDecode(io.ComfyNode):
    """Latents of the demo checkpoint to frames, enlarged to the size Wan's VAE would give."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVG2DemoDecode",
            display_name="SVG2 Demo Decode",
            category=CATEGORY,
            inputs=[
                io.Latent.Input("samples"),
                io.Combo.Input("decoder", options=["codec", "learned"], default="codec", optional=True),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples, decoder="codec") -> io.NodeOutput:
        latents = comfy.latent_formats.Wan21().process_in(samples["samples"].float().cpu())
        return io.NodeOutput(decode(latents[0], learned=decoder == "learned"))


class DemoSave(io.ComfyNode):
    """Frames and SVG2's report of the run behind them, unrounded, into the output folder for demo.py to read."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVG2DemoSave",
            display_name="SVG2 Demo Save",
            category=CATEGORY,
            is_output_node=True,
            inputs=[
                io.Image.Input("images"),
                io.String.Input("name"),
                Stats.Input("stats", optional=True),
                Stats.Input("stats_2", optional=True, tooltip="of the second model, where a workflow has two"),
            ],
        )

    @classmethod
    def execute(cls, images, name, stats=None, stats_2=None) -> io.NodeOutput:
        folder = Path(folder_paths.get_output_directory())
        reports = [handle.latest() for handle in (stats, stats_2) if handle is not None]
        run = {"reports": [r.to_dict() for r in reports if r is not None], "dense_attention": optimized_attention.__name__}
        (folder / f"{name}.json").write_text(json.dumps(run))
        np.save(folder / f"{name}.npy", images.float().cpu().numpy())
        return io.NodeOutput()


class DemoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DemoStartFrame, DemoConditioning, DemoDecode, DemoSave]
