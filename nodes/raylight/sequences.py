"""Which tokens are video where Raylight has cut a model's sequence among GPUs and its attention gathers it again.

Read in Raylight 1.5.1 and in a fork that has MiniMax H3. Each GPU gets a part of the sequence, filled up with zeros to a multiple of the GPUs; text masks are left out.
"""

import math

from ...svg2_core.adapters.sequence import PAD, TEXT, VIDEO, Sequence
from ...svg2_core.reasons import Reason, Refusal
from ..patching.layouts import HUNYUAN_REFERENCES, HUNYUAN_TEXT, family_of, text_and_video
from ..patching.model_call import ModelCall


def find_sequence(call: ModelCall, blocks: str, gpus: int, tokens: int) -> Sequence | Refusal:
    """The order of so many tokens of a self-attention in the network's list `blocks`, or why it is not one over the video."""
    rule = _CUT_OTHERWISE.get(family_of(call.network).network, _cut_at_once)
    found = rule(call, blocks, gpus, tokens)
    # A text that each GPU has whole comes as often as there are GPUs; LTX-Video's is cut as the video is.
    if rule not in _TEXT_INSIDE and any(tokens in (gpus * length, length + -length % gpus) for length in call.other_lengths):
        if isinstance(found, Sequence):
            return Refusal(Reason.UNKNOWN_LAYOUT, f"{tokens:,} video tokens and as many of another input cannot be told apart")
        return Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)
    return found


def grid_of(call: ModelCall, gpus: int) -> tuple[int, int, int]:
    """Of the video's tokens as they stand in the sequence, for the picture of clusters; zeros where they stand in another order."""
    return (0, 0, 0) if gpus > 1 and _CUT_OTHERWISE.get(family_of(call.network).network) is _rows_apart else call.grid


def _cut_at_once(call: ModelCall, blocks: str, gpus: int, tokens: int) -> Sequence | Refusal:
    """One sequence, filled up at its end. Where it is not known how long it was (references, VACE), what fills it up counts as it
    does in Raylight's own attention: at most a token a GPU."""
    video_range, refusal, found = family_of(call.network).video, None, None
    for real in range(tokens - gpus + 1, tokens + 1):
        place = video_range(call, real)
        if isinstance(place, Refusal):
            refusal = refusal or place
            continue
        start, length = place
        found = Sequence(((TEXT, start), (VIDEO, length), (TEXT, real - start - length), (PAD, tokens - real)))
        if length == call.video_tokens:
            break
    return found or refusal


def _text_and_video_apart(call: ModelCall, blocks: str, gpus: int, tokens: int) -> Sequence | Refusal:
    """HunyuanVideo: its double blocks have a share of the text and a share of the video on each GPU, its single blocks one sequence."""
    text, video = text_and_video(call, HUNYUAN_TEXT, HUNYUAN_REFERENCES)
    streams = (TEXT, text), (VIDEO, video)
    sequence = Sequence.shared_out(gpus, *streams) if blocks == "double_blocks" else Sequence.of(*streams, multiple=gpus)
    return _if_so_long(sequence, tokens)


def _rows_apart(call: ModelCall, blocks: str, gpus: int, tokens: int) -> Sequence | Refusal:
    """Cosmos-Predict2: each GPU has some rows of every frame."""
    return _if_so_long(Sequence.rows_shared_out(gpus, *call.grid), tokens)


def _frames_apart(call: ModelCall, blocks: str, gpus: int, tokens: int) -> Sequence | Refusal:
    """Cosmos 1: each GPU has some frames."""
    frames, *plane = call.grid
    return _if_so_long(Sequence(((VIDEO, call.video_tokens), (PAD, -frames % gpus * math.prod(plane)))), tokens)


def _video_last(call: ModelCall, blocks: str, gpus: int, tokens: int) -> Sequence | Refusal:
    """MiniMax H3: text, references and sound, then the video; how long all of it is stands in what the host prepared."""
    layout = (call.inputs.get("minimax_payload") or {}).get("layout")
    if layout is None:
        return Refusal(Reason.UNKNOWN_LAYOUT, "MiniMax H3's sequence was not laid out by the host")
    start, stop, _ = layout.segments[-1]
    if stop - start != call.video_tokens:
        return Refusal(Reason.UNKNOWN_LAYOUT, f"{stop - start:,} tokens of video, and the latent has {call.video_tokens:,}")
    return _if_so_long(Sequence.of((TEXT, start), (VIDEO, stop - start), multiple=gpus), tokens)


def _if_so_long(sequence: Sequence, tokens: int) -> Sequence | Refusal:
    return sequence if sequence.tokens == tokens else Refusal(Reason.NOT_VIDEO_SELF_ATTENTION)


_CUT_OTHERWISE = {
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": _text_and_video_apart,
    "comfy.ldm.cosmos.predict2.MiniTrainDIT": _rows_apart,
    "comfy.ldm.cosmos.model.GeneralDIT": _frames_apart,
    "comfy.ldm.minimax.model.MiniMaxH3Model": _video_last,
}
_TEXT_INSIDE = (_text_and_video_apart, _video_last)  # whose blocks have no attention over another input alone
