"""Per model family: which tokens of an attention call are video. One entry of FAMILIES adds a family.

Models that are not in FAMILIES are served by one general rule: a call over exactly the latent's tokens is video
self-attention. Whatever an entry or the rule cannot prove stays dense, with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...svg2_core.layout import Layout
from ...svg2_core.reasons import Reason, Refusal
from .model_call import ModelCall

VideoRange = Callable[[ModelCall, int], tuple[int, int] | Refusal]


def latent_tokens(call: ModelCall) -> int:
    """How many tokens the latent becomes."""
    return call.video_tokens


def tokens_kept(call: ModelCall) -> int:
    """LTX-Video drops the tokens whose place in the denoise mask is negative, which guides smaller than the video have between
    theirs (IC-LoRA with a downscale factor). Waits for the device once per model evaluation, if there are guides."""
    guides, mask = call.inputs.get("keyframe_idxs"), call.inputs.get("denoise_mask")
    if mask is None or guides is None or guides.shape[2] == 0:
        return call.video_tokens
    return call.once(mask, lambda: int((mask[0] >= 0).all(0).sum()))


def of_another_input(call: ModelCall, tokens: int) -> bool:
    """Whether so many tokens may be another input's: text, sound, or LTX-2's sound after a sample of the voice."""
    voice = call.inputs.get("ref_audio")
    before = 0 if voice is None else voice["tokens"].shape[1]
    return not call.other_lengths.isdisjoint((tokens, tokens - before))


def whole_sequence(call: ModelCall, tokens: int) -> tuple[int, int] | Refusal:
    """The sequence is the video, with reference, control or motion tokens that a variant adds; text is elsewhere."""
    if tokens < family_of(call.network).length(call):
        return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)
    if of_another_input(call, tokens):
        return Refusal(Reason.UNKNOWN_LAYOUT, f"{tokens:,} video tokens and as many of another input cannot be told apart")
    return 0, tokens


def latent_only(call: ModelCall, tokens: int) -> tuple[int, int] | Refusal:
    """The general rule: nothing but the latent's tokens, of more than one frame."""
    if call.frames == 1:
        return an_image(call, tokens)
    length = family_of(call.network).length(call)
    if tokens > length:
        return Refusal(Reason.UNKNOWN_LAYOUT, f"{tokens:,} tokens, and the latent has {length:,}")
    return whole_sequence(call, tokens)


def either_branch(call: ModelCall, tokens: int) -> tuple[int, int] | Refusal:
    """Wan Animate 2 runs the video that drives it through the same blocks: one frame fewer, as the latent begins with a picture."""
    driving = call.inputs.get("pose_latents")
    if driving is not None and tokens == call.tokens_of(driving) and not of_another_input(call, tokens):
        return 0, tokens
    return whole_sequence(call, tokens)


def an_image(call: ModelCall, tokens: int) -> Refusal:
    """A model that makes images."""
    return Refusal(Reason.UNKNOWN_LAYOUT, "its latent is an image")


def after_text(*text: str, references: str | None = None) -> VideoRange:
    """Text first, then the video. text: the model's inputs `[B, L, C]` that become text; references: a latent before the video."""

    def find(call: ModelCall, tokens: int) -> tuple[int, int] | Refusal:
        start, video = text_and_video(call, text, references)
        if tokens < start + video:
            return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)  # the text encoder inside the model
        if tokens > start + video:
            return Refusal(Reason.UNKNOWN_LAYOUT, f"{tokens:,} tokens are not {start:,} of text and {video:,} of video")
        return start, video

    return find


def text_and_video(call: ModelCall, text: tuple[str, ...], references: str | None = None) -> tuple[int, int]:
    """How many tokens those inputs and the latent become, each."""
    latent = call.inputs.get(references)
    start = sum(call.inputs[name].shape[1] for name in text if call.inputs.get(name) is not None)
    return start, call.video_tokens + (0 if latent is None else call.tokens_of(latent))


def before_text(text: str) -> VideoRange:
    """The video, then the text `[B, L, C]` of that input, less what its mask drops."""

    def find(call: ModelCall, tokens: int) -> tuple[int, int] | Refusal:
        if tokens < call.video_tokens:
            return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)
        if tokens > call.video_tokens + call.inputs[text].shape[1]:
            return Refusal(Reason.UNKNOWN_LAYOUT, f"{tokens:,} tokens, and the latent has {call.video_tokens:,}")
        return 0, call.video_tokens

    return find


def at_the_end(call: ModelCall, tokens: int) -> tuple[int, int] | Refusal:
    """The video comes last; all before it (text, references, sound) stays exact."""
    start = tokens - call.video_tokens
    if start < call.inputs["context"].shape[1]:
        return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)
    return start, call.video_tokens


def part_of_the_latent(call: ModelCall, queries: int, keys: int, mask) -> Layout | Refusal:
    """The general rule for queries that are a part of the sequence: some of the latent's tokens over all of them."""
    if keys != family_of(call.network).length(call) or of_another_input(call, queries) or of_another_input(call, keys) or queries > keys:
        return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)
    if mask is not None:
        return Refusal(Reason.UNKNOWN_LAYOUT, f"{queries:,} queries over {keys:,} keys: a part of the video under a mask of its own")
    return Layout(0, keys, queries=(0, queries))


def before_guides(call: ModelCall, queries: int, keys: int, mask) -> Layout | Refusal:
    """LTX-Video with guides of less than full strength: what is made attends to the guides, which come last, with a bias, which is
    what text is to other models. The guides' own queries, whose biases differ from one to the next, stay dense."""
    bias = None
    if mask is not None and mask.shape == (1, 1, 1, keys) and keys == family_of(call.network).length(call):
        bias = call.once(mask, lambda: _bias_after(queries, mask[0, 0], call.batch))  # once alone: it keeps one value of a mask
    return part_of_the_latent(call, queries, keys, mask) if bias is None else Layout(0, queries, bias, queries=(0, queries))


def _bias_after(video: int, mask: torch.Tensor, batch: int) -> torch.Tensor | None:
    """The bias `[B, N - video]` of the keys behind so many of the video; None if it is of those as well. Waits for the device."""
    return None if bool(mask[:, :video].any()) else mask[:, video:].float().expand(batch, -1).contiguous()


def frame_by_frame(call: ModelCall, queries: int, keys: int, mask) -> Layout | Refusal:
    """Wan Animate 2 makes each frame by itself, over all tokens of the latent and then those of the frame that drives it, which stay
    exact."""
    video, frame = call.video_tokens, call.grid[1] * call.grid[2]
    if mask is not None or queries != frame or keys not in (video, video + frame):
        return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)
    return Layout(0, video, queries=(0, queries))


@dataclass(frozen=True)
class Family:
    """A model family.

    network: the host's class that its diffusion models are, or derive from;
    video: first video token and their count in a self-attention of so many tokens, or why that is not known;
    length: how many tokens an evaluation's latent becomes, where some are dropped;
    part: the layout of so many queries over more or fewer keys under a mask, where they are a part of the video; shared_keys:
        all parts of one block have the same keys of the video, and the first one has no others;
    preset: name of its presets in svg2_core.presets;
    blocks: the network's lists of blocks in the order they run, none for its longest list;
    wrapped: the network calls DIFFUSION_MODEL wrappers.
    """

    network: str
    video: VideoRange
    length: Callable[[ModelCall], int] = latent_tokens
    part: Callable[[ModelCall, int, int, torch.Tensor | None], Layout | Refusal] = part_of_the_latent
    shared_keys: bool = False
    preset: str = "other"
    blocks: tuple[str, ...] = ()
    wrapped: bool = True


HUNYUAN_TEXT, HUNYUAN_REFERENCES = ("context", "txt_byt5", "clip_fea"), "ref_latent"

FAMILIES = (
    # Derives from the next one.
    Family("comfy.ldm.wan.model_animate2.WanAnimate2Model", either_branch, part=frame_by_frame, shared_keys=True,
           preset="wan_t2v", blocks=("blocks",)),
    Family("comfy.ldm.wan.model.WanModel", whole_sequence, preset="wan_t2v", blocks=("blocks",)),
    # Vision and ByT5 features (1.5) stand among the text. Its double blocks end before its single blocks begin.
    Family("comfy.ldm.hunyuan_video.model.HunyuanVideo", after_text(*HUNYUAN_TEXT, references=HUNYUAN_REFERENCES),
           preset="hunyuan_video", blocks=("double_blocks", "single_blocks")),
    Family("comfy.ldm.cosmos.model.GeneralDIT", whole_sequence, preset="cosmos"),
    Family("comfy.ldm.anima.model.Anima", an_image),  # derives from the next one
    Family("comfy.ldm.cosmos.predict2.MiniTrainDIT", whole_sequence, preset="cosmos"),
    Family("comfy.ldm.lightricks.model.LTXVModel", latent_only, tokens_kept, before_guides),  # LTX-2, with sound, derives from it
    Family("comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel", after_text("context")),
    Family("comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint", before_text("c_crossattn"), wrapped=False),
    Family("comfy.ldm.minimax.model.MiniMaxH3Model", at_the_end),
)  # fmt: skip

_GENERAL = Family("", latent_only)


def family_of(network: torch.nn.Module) -> Family:
    """The entry of FAMILIES for a network, or the general rule's."""
    network = uncompiled(network)
    # By name: a class that this version of the host does not have costs nothing and breaks nothing.
    names = {f"{c.__module__}.{c.__qualname__}" for c in type(network).__mro__}
    return next((family for family in FAMILIES if family.network in names), _GENERAL)


@torch.compiler.disable
def uncompiled(network: torch.nn.Module) -> torch.nn.Module:
    """The network itself, where torch.compile stands in front of it."""
    return getattr(network, "_orig_mod", network)


@torch.compiler.disable
def calls_wrapper(network: torch.nn.Module) -> bool:
    """Whether a network calls DIFFUSION_MODEL wrappers."""
    return family_of(network).wrapped


def trained_sparse(network: torch.nn.Module) -> bool:
    """Whether a checkpoint was trained for Video Sparse Attention (FastH3): it has the gate of that attention's coarse branch, for
    which a host that knows it makes a layer, and only then."""
    return any(name.endswith(".to_gate_compress") for name, _ in uncompiled(network).named_modules())


def preset_family(model) -> str:
    """Which presets a ModelPatcher's model takes."""
    network = model.get_model_object("diffusion_model")
    preset = family_of(network).preset
    # Image-to-video checkpoints of Wan take the image as extra input channels.
    return "wan_i2v" if preset == "wan_t2v" and network.in_dim > network.out_dim else preset


def find_layout(call: ModelCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask) -> Layout | Refusal:
    """Where the video tokens of q, k, v `[B, H, N, D]` sit, or why the call is not video self-attention."""
    batch, _, tokens, _ = q.shape
    keys = k.shape[2]
    if batch != call.batch:
        return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)
    if keys != tokens:
        return _of_a_part(call, q, k, v, mask)
    found = family_of(call.network).video(call, tokens)
    if isinstance(found, Refusal):
        return found
    if k.shape != q.shape or v.shape != q.shape:
        return Refusal(Reason.UNKNOWN_LAYOUT, "queries, keys and values differ in heads or width")
    start, length = found
    layout = Layout(start, length)
    if mask is None:
        return layout
    bias = call.once(mask, lambda: _text_bias(mask, batch, tokens, layout.video))
    return bias if isinstance(bias, Refusal) else Layout(start, length, bias)


def _of_a_part(call: ModelCall, q, k, v, mask) -> Layout | Refusal:
    queries, keys = q.shape[2], k.shape[2]
    layout = family_of(call.network).part(call, queries, keys, mask)
    if isinstance(layout, Refusal):
        return layout
    if v.shape != k.shape or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        return Refusal(Reason.UNKNOWN_LAYOUT, "queries, keys and values differ in heads or width")
    return layout


def _text_bias(mask: torch.Tensor, batch: int, tokens: int, video: slice) -> torch.Tensor | Refusal:
    """Additive logits `[B, text]` of a mask that only tells which text keys count; any other mask is refused.

    Waits for the device to see that no video key is masked: once per model evaluation, if a prompt is padded at all.
    """
    # The host's masks end in [queries, keys]; a third axis is the batch, a fourth stands before it for heads.
    shape = (1,) * (2 - mask.dim()) + tuple(mask.shape)
    rows, heads = (shape[0] if len(shape) > 2 else 1), (shape[1] if len(shape) > 3 else 1)
    if len(shape) > 4 or shape[-1] != tokens or shape[-2] != 1 or heads != 1 or rows not in (1, batch):
        return Refusal(Reason.UNSUPPORTED_MASK, f"a mask {list(mask.shape)} over {tokens:,} tokens")
    if video.stop - video.start == tokens:
        return Refusal(Reason.UNSUPPORTED_MASK, "a mask, and no text tokens")
    mask = mask.reshape(rows, tokens)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    if bool(mask[:, video].any()):
        return Refusal(Reason.UNSUPPORTED_MASK, "it masks video tokens")
    text = torch.cat([mask[:, : video.start], mask[:, video.stop :]], dim=1)
    return text.float().expand(batch, -1).contiguous()
