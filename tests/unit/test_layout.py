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
    layout.check(tokens, tokens)
    index = layout.text_index(tokens, torch.device("cpu"))
    assert index.dtype == torch.int64 and index.tolist() == text
    assert list(range(tokens))[layout.video] == [t for t in range(tokens) if t not in text]


@pytest.mark.parametrize(("start", "length", "tokens"), [(-1, 3, 5), (0, 0, 5), (3, 3, 5), (0, 6, 5), (0, -1, 5)])
def test_a_range_outside_the_sequence(start, length, tokens):
    with pytest.raises(ValueError, match="layout"):
        Layout(start, length).check(tokens, tokens)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (1, 5)])
def test_a_bias_of_another_length(shape):
    with pytest.raises(ValueError, match="text_bias"):
        Layout(0, 3, torch.zeros(shape)).check(5, 5)
    Layout(0, 3, torch.zeros(1, 2)).check(5, 5)


def test_queries_that_are_a_part():
    """Two of five video tokens ask, with a text token of their own after them."""
    layout = Layout(1, 5, torch.zeros(1, 2), queries=(0, 2))
    layout.check(3, 7)
    assert layout.text_index(7, torch.device("cpu")).tolist() == [0, 6]
    assert layout.text_queries(3, torch.device("cpu")).tolist() == [2]
    assert (layout.video, layout.video_queries, layout.queries_len) == (slice(1, 6), slice(0, 2), 2)


@pytest.mark.parametrize("queries", [(-1, 2), (0, 0), (2, 2), (0, 4)])
def test_queries_outside_their_own_sequence(queries):
    with pytest.raises(ValueError, match="3 queries"):
        Layout(0, 5, queries=queries).check(3, 5)


def test_fewer_queries_and_not_a_word_which():
    with pytest.raises(ValueError, match="3 queries over 5 keys"):
        Layout(0, 3).check(3, 5)
