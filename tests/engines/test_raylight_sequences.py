"""Which tokens are video where Raylight gathers them: for each attention of real models, as many tokens as its cutting makes of them."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.adapters.sequence import PAD, TEXT, VIDEO, Sequence
from svg2_pack.svg2_core.reasons import Reason, Refusal

VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
NAMES = ("wan2.1 t2v", "wan2.1 vace", "wan2.1 phantom", "hunyuan_video t2v", "hunyuan_video i2v reference", "hunyuan_video 1.5 t2v byt5",
         "cosmos t2v", "cosmos predict2 v2w", "ltxv t2v", "ltxav t2v", "minimax r2v references")  # fmt: skip
ODD = {"wan2.1 t2v": (1, 16, 5, 18, 14), "cosmos t2v": (1, 16, 5, 18, 14), "cosmos predict2 v2w": (1, 16, 5, 18, 14)}
GPUS = (1, 2, 3, 4)


@pytest.fixture
def self_attentions(host, monkeypatch):
    """`self_attentions(variant)`: of each self-attention within a block of its network in one evaluation, the evaluation, the block's
    list, the number of tokens, and what one GPU knows of them."""
    from svg2_pack.nodes.patching import override
    from svg2_pack.nodes.raylight.attention import _list_of
    from svg2_pack.nodes.raylight.worker import patch

    seen, find = [], override.find_layout

    def find_layout(call, q, k, v, mask):
        found = find(call, q, k, v, mask)
        if q.shape == k.shape and call.block is not None:
            seen.append((replace(call), _list_of(call), q.shape[2], found))
        return found

    def run(variant):
        monkeypatch.setattr(override, "find_layout", find_layout)
        shape = {"shape": torch.zeros(ODD[variant.name])} if variant.name in ODD else {}
        model = patch(tiny_models.build_or_skip(variant), token="test", preset="auto", backend="auto", knobs={"warmup_steps": 1, "min_tokens": 0}, gpus=1)
        tiny_models.sample(variant, model, steps=1, **shape)
        return seen

    return run


def padded(tokens: int, gpus: int) -> int:
    return tokens + -tokens % gpus


def gathered(variant, call, blocks: str, tokens: int, gpus: int) -> int:
    """How many tokens Raylight makes of that many."""
    if blocks == "double_blocks":
        text = tokens - call.video_tokens - (64 if "reference" in variant.name else 0)
        return padded(text, gpus) + padded(tokens - text, gpus)
    frames, rows, columns = call.grid
    if "predict2" in variant.name:
        return frames * padded(rows, gpus) * columns
    return padded(frames, gpus) * rows * columns if variant.family == "cosmos" else padded(tokens, gpus)


@pytest.mark.parametrize("name", NAMES)
def test_each_attention_over_the_video_is_known_and_no_other(self_attentions, name):
    """As many tokens of the video, and of what is exact, as on one GPU; a sound is none."""
    from svg2_pack.nodes.raylight.sequences import find_sequence

    variant, known, others = VARIANTS[name], 0, 0
    for call, blocks, tokens, found in self_attentions(variant):
        for gpus in GPUS:
            length = gathered(variant, call, blocks, tokens, gpus)
            sequence = find_sequence(call, blocks, gpus, length)
            if isinstance(found, Refusal):
                assert sequence == found
                others += 1
                continue
            known += 1
            # With references among the video nobody tells how many tokens there were: what fills them up counts, as in Raylight.
            video = length if name == "wan2.1 phantom" else found.video_len
            assert (sequence.tokens, sequence.count(VIDEO)) == (length, video)
            assert sequence.count(TEXT) == tokens - found.video_len
            if gpus == 1:
                assert sequence.segments == Sequence.of((TEXT, found.video_start), (VIDEO, found.video_len), (TEXT, tokens - found.video.stop)).segments
            assert isinstance(find_sequence(call, blocks, gpus, 16), Refusal)
    assert known == len(GPUS) * variant.blocks
    assert (others > 0) == (name == "ltxav t2v")


def test_the_order_of_hunyuan_videos_blocks(self_attentions):
    """Text and video are shared out apart in the double blocks, and lie behind each other in the single ones."""
    from svg2_pack.nodes.raylight.sequences import find_sequence

    found = {blocks: find_sequence(call, blocks, 2, 332) for call, blocks, *_ in self_attentions(VARIANTS["hunyuan_video t2v"])}
    assert found["double_blocks"].segments == ((TEXT, 6), (VIDEO, 160), (TEXT, 5), (PAD, 1), (VIDEO, 160))
    assert found["single_blocks"].segments == ((TEXT, 11), (VIDEO, 320), (PAD, 1))


def test_a_text_as_long_as_the_video_is_not_told_apart(self_attentions):
    """Whole on each GPU, a text's keys come once a GPU. Where only the video's number fits, and no text is in the blocks, nothing is in doubt."""
    from svg2_pack.nodes.raylight.sequences import find_sequence

    call, blocks, *_ = self_attentions(VARIANTS["wan2.1 t2v"])[0]
    assert find_sequence(call, blocks, 2, 316).count(VIDEO) == 315
    for length, gpus in ((105, 3), (315, 2)):
        refusal = find_sequence(replace(call, other_lengths=frozenset({length})), blocks, gpus, padded(315, gpus))
        assert refusal.reason is Reason.UNKNOWN_LAYOUT and "cannot be told apart" in refusal.detail
    assert find_sequence(replace(call, other_lengths=frozenset({8})), blocks, 2, 16).reason is Reason.NOT_VIDEO_SELF_ATTENTION
