"""The order of tokens among devices, against what padding, cutting and gathering tensors does."""

import pytest
import torch
from svg2_pack.svg2_core.adapters.sequence import PAD, TEXT, VIDEO, Sequence


def tokens(kind: int, count: int) -> torch.Tensor:
    """`[1, 1, count, 2]`, each token marked by its kind and its number."""
    return torch.stack([torch.full((count,), float(kind)), torch.arange(1.0, count + 1)], -1)[None, None]


def padded(x: torch.Tensor, devices: int, dim: int = 2) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = -shape[dim] % devices
    return torch.cat([x, x.new_zeros(shape)], dim)


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("text, video", [(7, 30), (8, 24), (2, 5)])
def test_streams_shared_out(devices, text, video):
    """As each device holds a share of the text and of the video, and all are gathered."""
    streams = tokens(1, text), tokens(2, video)
    shares = [padded(x, devices).chunk(devices, 2) for x in streams]
    gathered = torch.cat([x for of_device in zip(*shares, strict=True) for x in of_device], 2)
    sequence = Sequence.shared_out(devices, (TEXT, text), (VIDEO, video))
    assert sequence.tokens == gathered.shape[2]
    found, layout = sequence.gather(gathered), sequence.layout
    assert torch.equal(found[:, :, layout.video], streams[1])
    assert torch.equal(found[:, :, : layout.video_start], streams[0]) and found.shape[2] == text + video
    assert torch.equal(sequence.scatter(found), gathered)


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("before, after", [(0, 0), (6, 0), (0, 5)])
def test_padding_at_the_end_is_cut_off_without_a_copy(devices, before, after):
    segments = [(TEXT, before), (VIDEO, 11), (TEXT, after)]
    gathered = padded(torch.cat([tokens(1, before), tokens(2, 11), tokens(3, after)], 2), devices)
    sequence = Sequence.of(*segments, multiple=devices)
    found = sequence.gather(gathered)
    assert found.data_ptr() == gathered.data_ptr() and torch.equal(found[:, :, sequence.layout.video], tokens(2, 11))
    assert torch.equal(sequence.scatter(found), gathered)
    if sequence.tokens == found.shape[2]:
        assert sequence.scatter(found) is found


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_rows_shared_out(devices):
    frames, rows, columns = 2, 5, 3
    video = tokens(2, frames * rows * columns).view(1, 1, frames, rows, columns, 2)
    shares = padded(video, devices, dim=3).chunk(devices, 3)
    gathered = torch.cat([share.flatten(2, 4) for share in shares], 2)
    sequence = Sequence.rows_shared_out(devices, frames, rows, columns)
    found = sequence.gather(gathered)
    assert sequence.layout.video == slice(0, 30)
    assert sorted(found[0, 0, :, 1].tolist()) == list(range(1, 31)) and torch.equal(sequence.scatter(found), gathered)


def test_bad_segments_are_named():
    with pytest.raises(ValueError, match="sound"):
        Sequence((("sound", 3),))
    with pytest.raises(ValueError, match="no video"):
        Sequence(((TEXT, 3), (PAD, 1), (VIDEO, 0)))
