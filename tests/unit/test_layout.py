"""Layout: which tokens are video, which are text."""

import pytest
import torch
from svg2_pack.svg2_core.layout import Layout


@pytest.mark.parametrize(
    ("start", "length", "tokens", "text"),
    [
        (0, 5, 5, []),
        (0, 3, 5, [3, 4]),
        (2, 3, 5, [0, 1]),
        (1, 3, 6, [0, 4, 5]),
    ],
)
def test_text_and_video_share_out_the_tokens(start, length, tokens, text):
    layout = Layout(start, length)
    layout.check(tokens)
    index = layout.text_index(tokens, torch.device("cpu"))
    assert index.dtype == torch.int64 and index.tolist() == text
    assert list(range(tokens))[layout.video] == [t for t in range(tokens) if t not in text]


@pytest.mark.parametrize(("start", "length", "tokens"), [(-1, 3, 5), (0, 0, 5), (3, 3, 5), (0, 6, 5), (0, -1, 5)])
def test_a_range_outside_the_sequence(start, length, tokens):
    with pytest.raises(ValueError, match="layout"):
        Layout(start, length).check(tokens)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (1, 5)])
def test_a_bias_of_another_length(shape):
    with pytest.raises(ValueError, match="text_bias"):
        Layout(0, 3, torch.zeros(shape)).check(5)
    Layout(0, 3, torch.zeros(1, 2)).check(5)
