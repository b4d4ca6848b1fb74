"""Every video model family of the host at test size: its own classes, random weights, and the inputs its nodes set."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import tiny_wan
import torch
from torch import Tensor


@dataclass(frozen=True)
class Variant:
    """One model in one use. What the callables return is new on each call, and the same on each.

    tokens: length of a video self-attention call as the attention function sees it, with everything the model packs
        into it.
    text: how many of those tokens precede the video and follow it; reference frames count as video unless other
        tokens stand between them and the video.
    blocks: video self-attention calls in one evaluation of the model.
    noise_mask: of the latent, where part of it is given: 0 is kept.
    """

    name: str
    family: str
    build: Callable  # () -> ModelPatcher
    conditioning: Callable  # (seed=0) -> [[text embeddings, inputs]]; the seed is the text's
    latent: Callable  # () -> Tensor, or NestedTensor of several streams
    tokens: int
    text: tuple[int, int]
    blocks: int
    noise_mask: Callable | None = None


def build_or_skip(variant: Variant):
    """Its model; in an older ComfyUI than the tests' own, whose models are fewer, the test is skipped instead."""
    import comfyui_version
    import pytest

    try:
        return variant.build()
    except AttributeError as error:
        if comfyui_version.__version__ == sys.modules["svg2_host_script"].VERSION or "comfy.supported_models" not in str(error):
            raise
        pytest.skip(f"ComfyUI {comfyui_version.__version__} has no such model: {error}")


def sample(variant: Variant, model=None, steps: int = 2, **kwargs) -> Tensor:
    """Sample `variant` by `tiny_wan.sample`, from `model` (default: a new one). Several streams come packed in one."""
    import comfy.utils

    inputs = {"shape": variant.latent(), "positive": variant.conditioning(), "negative": variant.conditioning(seed=9)}
    if variant.noise_mask is not None:
        inputs["noise_mask"] = variant.noise_mask()
    out = tiny_wan.sample(variant.build() if model is None else model, steps=steps, **{**inputs, **kwargs})
    return comfy.utils.pack_latents(out.unbind())[0] if out.is_nested else out


# Models

QK_NORM = re.compile(r"(norm_[qk]|[qk]_norm|query_norm|key_norm|to_[qk]\.1)(_[xy])?\.weight$")


@torch.no_grad()
def _randomise(network: torch.nn.Module, seed: int) -> None:
    """Scaled so that activations keep their size, and queries and keys are large enough for uneven attention."""
    g = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        if p.dim() == 1 and name.endswith("weight"):  # of a norm
            p.fill_(3.0 if QK_NORM.search(name) else 1.0)
        else:
            p.normal_(std=(p[0] if p.dim() > 1 else p).numel() ** -0.5, generator=g)
    for name, buffer in network.named_buffers():
        if name == "rope.inv_freq":  # MiniMax's comes with its weights
            buffer.copy_(1e4 ** -(torch.arange(len(buffer)) / len(buffer)))


def _build(config: str, sizes: dict, loader: bool = True, metadata: dict | None = None, adapt: Callable | None = None,
           seed: int = 0):  # fmt: skip
    """A ModelPatcher of comfy.supported_models.`config`, fp32.

    loader: through the host's loader, which infers the sizes from the weights, and from `metadata` as of a safetensors
        file. Families of which it infers only the published sizes are made from their config.
    adapt: what to do to the network at last.
    """
    import comfy.sd
    import comfy.supported_models

    made = getattr(comfy.supported_models, config)(sizes)
    made.set_inference_dtype(torch.float32, None)
    model = made.get_model({})
    _randomise(model.diffusion_model, seed)
    if not loader:
        return _patcher(model)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        model.diffusion_model.state_dict(),
        model_options={"dtype": torch.float32},
        metadata=None if metadata is None else {"config": json.dumps({"transformer": metadata})},
    )
    assert type(patcher.model) is type(model), f"loaded as {type(patcher.model).__name__}"
    if adapt is not None:
        adapt(patcher.model.diffusion_model)
    return patcher


def _patcher(model):
    import comfy.model_management
    import comfy.model_patcher

    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model, *devices)


# Inputs, described: a tuple of sizes is a random tensor, a function makes its value from a generator.


def _made(value, g: torch.Generator):
    if isinstance(value, tuple):
        return torch.randn(value, generator=g)
    if isinstance(value, list):
        return [_made(v, g) for v in value]
    if isinstance(value, dict):
        return {k: _made(v, g) for k, v in value.items()}
    return value(g) if callable(value) else value


def _conditioning(text: tuple, extra: dict, seed: int = 0) -> list:
    embeddings = torch.randn(text, generator=torch.Generator().manual_seed(seed))
    return [[embeddings, _made(extra, torch.Generator().manual_seed(1000))]]


def _clip(tokens: int, width: int):
    """What a CLIP vision encoder says about an image."""

    def make(g):
        import comfy.clip_vision

        out = comfy.clip_vision.Output()
        out.penultimate_hidden_states = torch.randn(1, tokens, width, generator=g)
        out.last_hidden_state = torch.randn(1, tokens, width, generator=g)
        return out

    return make


def _first_kept(frames: int, height: int, width: int, channels: int = 1):
    """A mask whose first frame is given."""

    def make(g=None):
        mask = torch.ones(1, channels, frames, height, width)
        mask[:, :, 0] = 0
        return mask

    return make


def _latent(*streams: tuple, given: slice | None = None):
    """An empty latent of these shapes; given: the video frames that are not empty."""
    import comfy.nested_tensor

    tensors = [torch.zeros(shape) for shape in streams]
    if given is not None:
        frames = tensors[0][:, :, given]
        frames.copy_(torch.randn(frames.shape, generator=torch.Generator().manual_seed(2000)))
    return tensors[0] if len(tensors) == 1 else comfy.nested_tensor.NestedTensor(tensors)


FIRST = slice(0, 1)


def _variant(name, family, config, sizes, text, extra, latents, tokens, around=(0, 0), *, blocks, given=None,
             noise_mask=None, **build) -> Variant:  # fmt: skip
    return Variant(
        name,
        family,
        partial(_build, config, sizes, **build),
        partial(_conditioning, text, extra),
        partial(_latent, *latents, given=given),
        tokens,
        around,
        blocks,
        noise_mask,
    )


# Wan

WAN_VIDEO, WAN_FRAME = (1, 16, 5, 16, 16), (1, 16, 1, 16, 16)
WAN_CLIP = {"clip_vision_output": _clip(257, 1280)}
WAN_IMAGE = {"concat_latent_image": WAN_VIDEO, "concat_mask": _first_kept(5, 16, 16)}
WAN_IMAGE_4 = {"concat_latent_image": WAN_VIDEO, "concat_mask": _first_kept(5, 16, 16, 4)}  # a mask per pixel frame
WAN_CAMERA = {"concat_latent_image": WAN_VIDEO, "camera_conditions": (1, 24, 5, 128, 128)}
WAN_CONTROL = {"concat_latent_image": (1, 32, 5, 16, 16), "reference_latents": [WAN_FRAME]}


def _wan(name, config="WAN21_T2V", kind="t2v", extra=None, tokens=320, latent=WAN_VIDEO, *, blocks=3, layers=3,
         sizes=None, **rest) -> Variant:  # fmt: skip
    sizes = {"image_model": "wan2.1", "model_type": kind, "dim": 256, "ffn_dim": 512, "num_heads": 2,
             "num_layers": layers, "in_dim": 16, "out_dim": 16, **(sizes or {})}  # fmt: skip
    return _variant(name, "wan", config, sizes, (1, 7, 4096), extra or {}, [latent], tokens, blocks=blocks, **rest)


def _vace(contexts: int) -> dict:
    return {"vace_frames": [(1, 32, 5, 16, 16)] * contexts, "vace_mask": [(1, 64, 5, 16, 16)] * contexts,
            "vace_strength": [0.8, 0.6][:contexts]}  # fmt: skip


SCAIL = {"reference_latents": [WAN_FRAME], "pose_video_latent": (1, 16, 5, 8, 8), **WAN_CLIP}
SCAIL_2 = {**SCAIL, "driving_mask_28ch": (1, 5, 28, 8, 8), "ref_mask_28ch": (1, 6, 28, 16, 16), "ref_mask_flag": False}
# Of two references the second stands first; what drives the video may be another's motion (the flag is set) or its place.
SCAIL_2_REFERENCES = {**SCAIL_2, "reference_latents": [WAN_FRAME] * 2, "ref_mask_28ch": (1, 7, 28, 16, 16),
                      "ref_mask_flag": True}  # fmt: skip
VACE = {"vace_layers": 2, "vace_in_dim": 96}
TI2V = {"in_dim": 48, "out_dim": 48}
AUDIO_LAYERS = {"audio_inject_layers": [0, 2]}


def _no_face_encoder(network) -> None:
    """The face's encoder is seconds of convolutions at 512 x 512, and no attention: a few pixels stand in for it."""
    network.motion_encoder.enc.encode_motion = lambda faces: faces[..., ::16, ::16].flatten(1)[:, :20]


WAN = [
    _wan("wan2.1 t2v"),
    _wan("wan2.1 i2v", "WAN21_I2V", "i2v", {**WAN_IMAGE, **WAN_CLIP}, sizes={"in_dim": 36}),
    _wan("wan2.1 flf2v", "WAN21_I2V", "i2v", {**WAN_IMAGE_4, "clip_vision_output": _clip(514, 1280)},
         sizes={"in_dim": 36, "flf_pos_embed_token_number": 514}),
    _wan("wan2.1 vace", "WAN21_Vace", "vace", _vace(1), layers=4, blocks=6, sizes=VACE),
    _wan("wan2.1 vace 2 contexts", "WAN21_Vace", "vace", _vace(2), layers=4, blocks=8, sizes=VACE),
    _wan("wan2.1 fun camera", "WAN21_Camera", "camera", {**WAN_CAMERA, **WAN_CLIP}, sizes={"in_dim": 32}),
    _wan("wan2.1 fun control", "WAN21_FunControl2V", "i2v", {**WAN_CONTROL, **WAN_CLIP}, 384,
         sizes={"in_dim": 48, "in_dim_ref_conv": 16}),
    _wan("wan2.1 phantom", extra={"time_dim_concat": (1, 16, 2, 16, 16)}, tokens=448),
    _wan("wan2.1 humo", "WAN21_HuMo", "humo",
         {"audio_embed": (1, 5, 8, 5, 1280), "reference_latents": [WAN_FRAME]}, 384, sizes={"in_dim": 36}),
    _wan("wan2.1 scail", "WAN21_SCAIL", "scail", SCAIL, 64 + 320 + 80, sizes={"in_dim": 20}),
    _wan("wan2.1 scail2 replacement", "WAN21_SCAIL2", "scail2", SCAIL_2, 64 + 320 + 80, sizes={"in_dim": 20}),
    _wan("wan2.1 scail2 2 references", "WAN21_SCAIL2", "scail2", SCAIL_2_REFERENCES, 2 * 64 + 320 + 80,
         sizes={"in_dim": 20}),
    _wan("wan2.2 5b t2v", "WAN22_T2V", latent=(1, 48, 5, 16, 16), sizes=TI2V),
    _wan("wan2.2 5b i2v", "WAN22_T2V", latent=(1, 48, 5, 16, 16), sizes=TI2V, given=FIRST,
         noise_mask=_first_kept(5, 16, 16)),
    _wan("wan2.2 14b t2v", latent=(1, 16, 4, 13, 19), tokens=280),  # sizes that the patches do not divide
    _wan("wan2.2 14b i2v", extra=WAN_IMAGE, sizes={"in_dim": 36}),
    _wan("wan2.2 fun camera", "WAN22_Camera", "camera_2.2", {**WAN_CAMERA, **WAN_IMAGE_4}, sizes={"in_dim": 36}),
    _wan("wan2.2 fun control", extra={**WAN_IMAGE_4, **WAN_CONTROL, "concat_mask_index": 16}, tokens=384,
         sizes={"in_dim": 52, "in_dim_ref_conv": 16}),
    _wan("wan2.2 s2v", "WAN22_S2V", "s2v",
         {"audio_embed": (1, 25, 1024, 20), "reference_latents": [WAN_FRAME], "reference_motion": (1, 16, 19, 16, 16),
          "control_video": WAN_VIDEO}, 320 + 64 + 96, sizes=AUDIO_LAYERS, metadata=AUDIO_LAYERS),
    # A block in five sees the face, so there are five.
    _wan("wan2.2 animate", "WAN22_Animate", "animate",
         {**WAN_IMAGE_4, "pose_video_latent": (1, 16, 4, 16, 16), "face_video_pixels": (1, 3, 13, 64, 64), **WAN_CLIP},
         layers=5, blocks=5, sizes={"in_dim": 36}, adapt=_no_face_encoder),
    _wan("wan2.2 wandancer", "WAN22_WanDancer", "wandancer",
         {**WAN_IMAGE, **WAN_CLIP, "clip_vision_output_ref": _clip(257, 1280), "audio_embed": (1, 20, 35), "fps": 15.0,
          "audio_inject_scale": 0.8}, sizes={"in_dim": 36, **AUDIO_LAYERS}, metadata=AUDIO_LAYERS),
    _wan("wan2.2 in-context", extra={"context_latents": [(1, 16, 4, 16, 16), (1, 16, 1, 12, 20)]},
         latent=(1, 16, 4, 16, 16), tokens=256 + 256 + 60),
]  # fmt: skip


# Wan Animate 2, which the tests' host does not have: a network under its name that asks attention for the same, in the same
# order, and does little else. Not the model: what it asks is read off newer hosts (model_animate2.py).


def _animate_2_classes():
    """-> (the network, the host's model around it)"""
    import comfy.ldm.modules.attention
    import comfy.ldm.wan.model as wan
    import comfy.model_base
    from comfy.ldm.flux.math import apply_rope1

    def attend(q, k, v, options):
        """q, k, v `[B, N, H, D]`"""
        heads = q.shape[2]
        q, k, v = (x.flatten(2) for x in (q, k, v))
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads=heads, transformer_options=options)

    class Block(torch.nn.Module):
        """Its forward is never called, so that no hook of it runs."""

        def __init__(self, dim: int, heads: int, operations):
            super().__init__()
            self.heads = heads
            self.norm, self.norm_text = (torch.nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
            self.norm_q, self.norm_k = (operations.RMSNorm(dim) for _ in range(2))
            self.q, self.k, self.v, self.o = (operations.Linear(dim, dim) for _ in range(4))
            self.cross_attn = wan.WanT2VCrossAttention(dim, heads, operation_settings={"operations": operations})

        def keys_values(self, x, freqs) -> tuple[Tensor, Tensor]:
            k = self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1))
            return apply_rope1(k, freqs), self.v(x).unflatten(-1, (self.heads, -1))

        def project(self, x, freqs) -> tuple[Tensor, Tensor, Tensor]:
            x = self.norm(x)
            q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
            return apply_rope1(q, freqs), *self.keys_values(x, freqs)

        def rest(self, x, attention, text, options) -> Tensor:
            x = x + self.o(attention)
            return x + self.cross_attn(self.norm_text(x), text, transformer_options=options)

        def forward_pose(self, x, freqs, text, options) -> tuple[Tensor, Tensor, Tensor]:
            """The video that drives: one plain self-attention. Its keys and values go to forward_gen."""
            q, k, v = self.project(x, freqs)
            return self.rest(x, attend(q, k, v, options), text, options), k, v

        def forward_gen(self, x, freqs, text, driving, frame, buffers, options) -> Tensor:
            """Each frame's queries over all keys, and over those of its own frame of the video that drives. The first frame is a
            reference and has none. The buffers are the same in all blocks: what is behind all keys is written anew for a frame."""
            q, k, v = self.project(x, freqs)
            tokens = x.shape[1]
            if driving is None:
                return self.rest(x, attend(q, k, v, options), text, options)
            keys, values = buffers
            keys[:, :tokens], values[:, :tokens] = k, v
            out = [attend(q[:, :frame], k, v, options)]
            for start in range(frame, tokens, frame):
                keys[:, tokens:], values[:, tokens:] = (x[:, start - frame : start] for x in driving)
                out.append(attend(q[:, start : start + frame], keys, values, options))
            return self.rest(x, torch.cat(out, 1), text, options)

    class Network(wan.WanModel):
        """animate2_cache among its options: an object that keeps, by block, what goes into the branch of the video that drives."""

        def __init__(self, dim, num_heads, num_layers, in_dim, out_dim, operations, device=None, dtype=None, **sizes):
            super().__init__("t2v", dim=dim, num_heads=num_heads, num_layers=0, ffn_dim=dim, in_dim=in_dim, out_dim=out_dim,
                             operations=operations, device=device, dtype=dtype)  # fmt: skip
            self.blocks = torch.nn.ModuleList(Block(dim, num_heads, operations) for _ in range(num_layers))

        def _forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, pose_latents=None,
                     **kwargs):  # fmt: skip
            options, (f, h, w) = transformer_options, x.shape[2:]
            gen, grid, freqs = self._tokens(x), (f, h // 2, w // 2), self.rope_encode(f, h, w)
            text = self.text_embedding(context)
            pose = buffers = freqs_pose = None
            if pose_latents is not None:
                pose = self._tokens(torch.cat([pose_latents, torch.ones_like(pose_latents[:, :4]), pose_latents], 1))
                freqs_pose = self.rope_encode(f - 1, h, w, t_start=1)
                buffers = gen.new_empty(2, len(gen), gen.shape[1] + grid[1] * grid[2], self.num_heads, self.dim // self.num_heads)
            cache = options.get("animate2_cache")
            cached = cache is not None and len(cache.inputs) == len(self.blocks)
            options.update(grid_sizes=grid, block_type="double", total_blocks=len(self.blocks))
            for i, block in enumerate(self.blocks):
                options["block_index"] = i
                driving = None
                if pose is not None and cached:
                    driving = block.keys_values(block.norm(cache.inputs[i]), freqs_pose)
                elif pose is not None:
                    if cache is not None:
                        cache.inputs[i] = pose
                    pose, *driving = block.forward_pose(pose, freqs_pose, text, options)
                gen = block.forward_gen(gen, freqs, text, driving, grid[1] * grid[2], buffers, options)
            time = self.time_embedding(wan.sinusoidal_embedding_1d(self.freq_dim, timestep.flatten()))
            return self.unpatchify(self.head(gen, time[:, None]), grid)

        def _tokens(self, latent):
            return self.patch_embedding(latent).flatten(2).transpose(1, 2)

    class Model(comfy.model_base.WAN22_Animate):  # whose inputs it takes
        def __init__(self, config):
            flow = comfy.model_base.ModelType.FLOW
            super(comfy.model_base.WAN21, self).__init__(config, flow, unet_model=Network)
            self.image_to_video = True

    for made, name in ((Block, "WanAnimate2Block"), (Network, "WanAnimate2Model")):
        made.__module__, made.__qualname__ = "comfy.ldm.wan.model_animate2", name
    return Network, Model


def _build_animate_2(sizes: dict, seed: int = 0):
    import comfy.supported_models

    made = comfy.supported_models.WAN21_I2V(sizes)
    made.set_inference_dtype(torch.float32, None)
    _, model = _animate_2_classes()
    model = model(made)
    _randomise(model.diffusion_model, seed)
    return _patcher(model)


ANIMATE_2_SIZES = {"image_model": "wan2.1", "model_type": "animate2", "dim": 256, "num_heads": 2, "num_layers": 3,
                   "in_dim": 36, "out_dim": 16}  # fmt: skip
# In each block one self-attention of the video that drives, over 256 tokens, and five of a frame's 64 queries: over 320 keys,
# and then four times over those and 64 more.
ANIMATE_2 = Variant(
    "wan animate 2",
    "wan",
    partial(_build_animate_2, ANIMATE_2_SIZES),
    partial(_conditioning, (1, 7, 4096), {**WAN_IMAGE, "pose_video_latent": (1, 16, 4, 16, 16)}),
    partial(_latent, WAN_VIDEO),
    320,
    (0, 0),
    3 * (1 + 5),
)


# Hunyuan Video

HUNYUAN_VIDEO, HUNYUAN_FRAME = (1, 16, 5, 16, 16), (1, 16, 1, 16, 16)


def _padded(length: int, kept: int):
    """An attention mask of a prompt padded to `length`."""

    def make(g):
        mask = torch.zeros(1, length, dtype=torch.long)
        mask[:, :kept] = 1
        return mask

    return make


def _hunyuan(name, config="HunyuanVideo", extra=None, tokens=320, text=11, *, sizes=None, **rest) -> Variant:
    sizes = {"image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2],
             "vec_in_dim": 768, "axes_dim": [16, 56, 56], "context_in_dim": 4096, "hidden_size": 256, "mlp_ratio": 4.0,
             "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "theta": 256, "qkv_bias": True, "byt5": False,
             "guidance_embed": True, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
             "meanflow_sum": False, **(sizes or {})}  # fmt: skip
    extra = {"pooled_output": (1, 768), "guidance": 5.0, **(extra or {})}
    return _variant(name, "hunyuan_video", config, sizes, (1, text, 4096), extra, [HUNYUAN_VIDEO], tokens + text,
                    (text, 0), blocks=4, **rest)  # fmt: skip


HUNYUAN15_VIDEO = (1, 32, 5, 8, 8)
BYT5 = {"conditioning_byt5small": (1, 6, 1472)}


def _hunyuan15(name, config="HunyuanVideo15", extra=None, more_text=0, *, sizes=None, **rest) -> Variant:
    """Without single blocks, as published. more_text: tokens of what the model puts before the prompt."""
    sizes = {"image_model": "hunyuan_video", "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1],
             "vec_in_dim": None, "axes_dim": [16, 56, 56], "context_in_dim": 3584, "hidden_size": 256,
             "mlp_ratio": 4.0, "num_heads": 2, "depth": 3, "depth_single_blocks": 0, "theta": 256, "qkv_bias": True,
             "byt5": True, "guidance_embed": False, "meanflow": False, "use_cond_type_embedding": True,
             "vision_in_dim": 1152, "meanflow_sum": True, **(sizes or {})}  # fmt: skip
    text = 11 + more_text
    return _variant(name, "hunyuan_video", config, sizes, (1, 11, 3584), {"pooled_output": None, **(extra or {})},
                    [HUNYUAN15_VIDEO], 320 + text, (text, 0), blocks=3, **rest)  # fmt: skip


HUNYUAN = [
    _hunyuan("hunyuan_video t2v"),
    _hunyuan("hunyuan_video t2v padded", extra={"attention_mask": _padded(17, 9)}, text=17),
    _hunyuan("hunyuan_video i2v concat", "HunyuanVideoI2V",
             {"concat_latent_image": HUNYUAN_FRAME, "concat_mask": _first_kept(5, 16, 16)}, sizes={"in_channels": 33}),
    _hunyuan("hunyuan_video i2v token replace", extra={"guiding_frame_index": 0}, given=FIRST,
             noise_mask=_first_kept(5, 16, 16)),
    _hunyuan("hunyuan_video i2v reference", extra={"ref_latent": HUNYUAN_FRAME}, tokens=64 + 320),
    _hunyuan("skyreels i2v", "HunyuanVideoSkyreelsI2V", {"concat_latent_image": HUNYUAN_FRAME},
             sizes={"in_channels": 32}),
    _hunyuan15("hunyuan_video 1.5 t2v"),
    _hunyuan15("hunyuan_video 1.5 t2v padded", extra={"attention_mask": _padded(11, 8)}),
    _hunyuan15("hunyuan_video 1.5 t2v byt5", extra=BYT5, more_text=6),
    _hunyuan15("hunyuan_video 1.5 i2v", more_text=6 + 16,
               extra={**BYT5, "concat_latent_image": HUNYUAN15_VIDEO, "concat_mask": _first_kept(5, 8, 8),
                      "clip_vision_output": _clip(16, 1152)}),
    # Edits the video that it is given whole.
    _hunyuan15("capybara edit", more_text=6 + 16,
               extra={**BYT5, "concat_latent_image": HUNYUAN15_VIDEO, "clip_vision_output": _clip(16, 1152)}),
    _hunyuan15("hunyuan_video 1.5 sr", "HunyuanVideo15_SR_Distilled",
               {**BYT5, "concat_latent_image": (1, 66, 5, 8, 8), "noise_augmentation": 0.7}, more_text=6,
               sizes={"in_channels": 98, "meanflow": True}),
]  # fmt: skip


# Cosmos

COSMOS = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "out_channels": 16, "patch_spatial": 2,
          "patch_temporal": 1, "model_channels": 256, "num_blocks": 3, "num_heads": 2, "concat_padding_mask": True,
          "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop",
          "use_adaln_lora": True, "adaln_lora_dim": 64, "rope_t_extrapolation_ratio": 2.0}  # fmt: skip
COSMOS1 = {"image_model": "cosmos", "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True,
           "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable", **COSMOS}  # fmt: skip
PREDICT2 = {"image_model": "cosmos_predict2", "rope_enable_fps_modulation": False, **COSMOS}


def _cosmos(name, family, config, sizes, shape=(1, 16, 5, 16, 16), tokens=320, **rest) -> Variant:
    extra = {"attention_mask": _padded(13, 13), "frame_rate": 12.0}
    return _variant(name, family, config, sizes, (1, 13, 1024), extra, [shape], tokens, blocks=3, loader=False, **rest)


GIVEN_COSMOS = {"given": FIRST, "noise_mask": _first_kept(5, 16, 16)}
COSMOSES = [
    _cosmos("cosmos t2v", "cosmos", "CosmosT2V", {**COSMOS1, "in_channels": 16}),
    _cosmos("cosmos i2v", "cosmos", "CosmosI2V", {**COSMOS1, "in_channels": 17}, **GIVEN_COSMOS),
    _cosmos("cosmos predict2 t2i", "cosmos_predict2", "CosmosT2IPredict2", {**PREDICT2, "in_channels": 16},
            (1, 16, 1, 32, 32), 256),
    _cosmos("cosmos predict2 v2w", "cosmos_predict2", "CosmosI2VPredict2", {**PREDICT2, "in_channels": 17},
            **GIVEN_COSMOS),
]  # fmt: skip


# LTX-Video

LTX_VIDEO = (1, 128, 5, 8, 8)
LTXV = {"num_layers": 3, "attention_head_dim": 64, "num_attention_heads": 2, "cross_attention_dim": 128}
LTXAV = {"num_layers": 3, "attention_head_dim": 128, "num_attention_heads": 2, "cross_attention_dim": 256,
         "audio_attention_head_dim": 64, "audio_num_attention_heads": 2, "audio_cross_attention_dim": 128,
         "caption_channels": 256, "connector_num_attention_heads": 2, "connector_num_layers": 1, "rope_type": "split",
         "frequencies_precision": "float64", "use_middle_indices_grid": True,
         "causal_temporal_positioning": True}  # fmt: skip


def _keyframe(g) -> Tensor:
    """Pixel coordinates of a guide frame's tokens `[1, 3, 64, 2]`, of frame 8 here."""
    from comfy.ldm.lightricks.symmetric_patchifier import SymmetricPatchifier, latent_to_pixel_coords

    _, coordinates = SymmetricPatchifier(1, start_end=True).patchify(torch.zeros(1, 128, 1, 8, 8))
    pixels = latent_to_pixel_coords(coordinates, (8, 32, 32), causal_fix=True)
    pixels[:, 0] += 8
    return pixels


def _last_kept() -> Tensor:
    """The noise mask of five frames and a guide of strength 1 after them."""
    return _first_kept(6, 8, 8)().flip(2)


def _small_guide() -> Tensor:
    """The noise mask of five frames and a guide half as wide and high as they: between its tokens there are none."""
    mask = _last_kept()
    mask[:, :, 5] = -1
    mask[:, :, 5, ::2, ::2] = 0
    return mask


def _with_sound(video: Callable):
    """The noise mask of an audio-video latent, whose sound is all to be made."""

    def make():
        import comfy.nested_tensor

        return comfy.nested_tensor.NestedTensor([video(), torch.ones(1, 8, 31, 16)])

    return make


def _ltxv(name, extra=None, shape=LTX_VIDEO, tokens=320, **rest) -> Variant:
    extra = {"attention_mask": _padded(12, 9), "frame_rate": 24.0, **(extra or {})}
    return _variant(name, "ltxv", "LTXV", {"image_model": "ltxv", **LTXV}, (1, 12, 4096), extra, [shape], tokens,
                    blocks=3, metadata=LTXV, **rest)  # fmt: skip


def _ltxav(name, extra=None, shape=LTX_VIDEO, tokens=320, sizes=LTXAV, text=512, **rest) -> Variant:
    """text: its width, that of both streams' texts together: the text after the host's connectors, which make it 1,024 tokens
    long."""
    return _variant(name, "ltxv", "LTXAV", {"image_model": "ltxav", **sizes}, (1, 12, text), {"frame_rate": 24.0, **(extra or {})},
                    [shape, (1, 8, 31, 16)], tokens, blocks=3, metadata=sizes, **rest)  # fmt: skip


GUIDE = {"pre_filter_count": 64, "strength": 1.0, "pixel_mask": None, "latent_shape": [1, 8, 8]}
GUIDED = {"keyframe_idxs": _keyframe, "guide_attention_entries": [GUIDE]}
LTX_GUIDED = (1, 128, 6, 8, 8)
LTX_23 = {**LTXAV, "apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True}
LTX = [
    _ltxv("ltxv t2v"),
    _ltxv("ltxv i2v", given=FIRST, noise_mask=_first_kept(5, 8, 8)),
    _ltxv("ltxv guide", GUIDED, LTX_GUIDED, 384, given=slice(5, 6), noise_mask=_last_kept),
    _ltxav("ltxav t2v"),
    _ltxav("ltxav i2v", given=FIRST, noise_mask=_with_sound(_first_kept(5, 8, 8))),
    _ltxav("ltxav guide", GUIDED, LTX_GUIDED, 384, given=slice(5, 6), noise_mask=_with_sound(_last_kept)),
    _ltxav("ltxav ic-lora", GUIDED, LTX_GUIDED, 320 + 16, given=slice(5, 6), noise_mask=_with_sound(_small_guide)),
    _ltxav("ltxav reference sound", {"ref_audio": {"tokens": (1, 11, 128)}}),
    _ltxav("ltx 2.3 t2v", sizes=LTX_23, text=256 + 128),
]  # fmt: skip


# The others

MOCHI = {"image_model": "mochi_preview", "depth": 3, "patch_size": 2, "num_heads": 2, "hidden_size_x": 256,
         "hidden_size_y": 128, "mlp_ratio_x": 48.0, "mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12,
         "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
         "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0,
         "use_t5": True, "t5_feat_dim": 256, "t5_token_length": 16, "rope_theta": 10000.0}  # fmt: skip
COGVIDEOX = {"image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 3,
             "time_embed_dim": 256, "in_channels": 16, "use_rotary_positional_embeddings": True}  # fmt: skip
KANDINSKY = {"image_model": "kandinsky5", "model_dim": 128, "ff_dim": 256, "time_dim": 128, "num_text_blocks": 2,
             "num_visual_blocks": 3, "visual_embed_dim": 132}  # fmt: skip
MINIMAX = {"image_model": "minimax_h3", "hidden_size": 256, "num_layers": 3, "num_attention_heads": 2,
           "ffn_hidden_size": 512, "text_dim": 320, "time_embed_hidden_size": 256, "time_embed_dim": 128}  # fmt: skip


def _cogvideox(name, config, sizes, extra=None, tokens=320, shape=(1, 16, 5, 16, 16), **rest) -> Variant:
    return _variant(name, "cogvideox", config, {**COGVIDEOX, **sizes}, (1, 10, 4096), extra or {}, [shape],
                    tokens + 10, (10, 0), blocks=3, **rest)  # fmt: skip


def _kandinsky(name, sizes, extra=None, **rest) -> Variant:
    extra = {"pooled_output": (1, 768), **(extra or {})}
    return _variant(name, "kandinsky5", "Kandinsky5", {**KANDINSKY, **sizes}, (1, 14, 3584), extra,
                    [(1, 16, 5, 16, 16)], 320, blocks=3, **rest)  # fmt: skip


def _minimax(name, extra, before_audio=0) -> Variant:
    """before_audio: tokens of what stands between the text and the audio, which precedes the video."""
    before = 9 + before_audio + 2 * 37
    return _variant(name, "minimax", "MiniMaxH3", MINIMAX, (1, 9, 320), extra, [(1, 24, 7, 12, 12), (1, 32, 2, 37)],
                    before + 252, (before, 0), blocks=3)  # fmt: skip


OTHERS = [
    # Text tokens that the attention mask drops are not in the sequence.
    _variant("mochi t2v", "mochi", "GenmoMochi", MOCHI, (1, 16, 256), {"attention_mask": _padded(16, 9)},
             [(1, 12, 5, 16, 16)], 320 + 9, (0, 9), blocks=3, loader=False),
    _cogvideox("cogvideox t2v", "CogVideoX_T2V", {}),
    # Learned positions are for widths that three divides.
    _cogvideox("cogvideox i2v", "CogVideoX_I2V",
               {"in_channels": 32, "num_attention_heads": 3, "use_rotary_positional_embeddings": False,
                "use_learned_positional_embeddings": True},
               {"concat_latent_image": (1, 16, 1, 16, 16)}),
    # Two frames a token, so five are padded to six.
    _cogvideox("cogvideox 1.5 i2v", "CogVideoX_I2V", {"in_channels": 32, "patch_size_t": 2, "ofs_embed_dim": 256},
               {"concat_latent_image": (1, 16, 1, 16, 16)}, tokens=192),
    # The masks of what to take away, and the video without it.
    _cogvideox("void inpaint", "CogVideoX_Inpaint", {"in_channels": 48, "patch_size_t": 2},
               {"concat_latent_image": (1, 32, 4, 16, 16)}, tokens=128, shape=(1, 16, 4, 16, 16)),
    _kandinsky("kandinsky5 lite t2v", {}),
    # Heads of 128 are inferred of the published widths only.
    _kandinsky("kandinsky5 pro i2v", {"model_dim": 256, "axes_dims": (32, 48, 48)},
               {"time_dim_replace": (1, 16, 1, 16, 16), "concat_mask": _first_kept(5, 16, 16)}, loader=False),
    _minimax("minimax t2v", {}),
    _minimax("minimax i2v keyframes",
             {"minimax_keyframes": [{"resolved_frame_index": i, "latent": (1, 24, 1, 12, 12)} for i in (0, 21)],
              "minimax_frame_count": 22, "minimax_token_tags": _padded(9, 6)},
             before_audio=2 * 36),
    # An image, a video with its sound, a sound.
    _minimax("minimax r2v references",
             {"minimax_refs": [{"kind": "image", "latent_h": 8, "latent_w": 10, "latent": (1, 24, 1, 8, 10)},
                               {"kind": "video_audio", "latent_t": 2, "latent_h": 8, "latent_w": 8, "ref_audio_t": 5,
                                "latent": (1, 24, 2, 8, 8), "audio_latent": (1, 32, 2, 5)},
                               {"kind": "audio", "ref_audio_t": 7, "audio_latent": (1, 32, 2, 7)}]},
             before_audio=20 + 2 * 5 + 32 + 2 * 7),
]  # fmt: skip

VARIANTS = WAN + HUNYUAN + COSMOSES + LTX + OTHERS
