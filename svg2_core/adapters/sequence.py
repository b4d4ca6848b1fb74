"""The order of tokens in an attention whose sequence was cut among devices and gathered again."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch

from ..layout import Layout

VIDEO, TEXT, PAD = "video", "text", "pad"


@dataclass(frozen=True)
class Sequence:
    """Which tokens of a sequence are of the video, of the text (exact both ways), and padding (left out).

    segments: kind (VIDEO, TEXT or PAD) and length of each run of tokens, in order.
    Raises ValueError for a kind it does not know, a negative length, or a sequence without video.
    """

    segments: tuple[tuple[str, int], ...]

    def __post_init__(self):
        for kind, length in self.segments:
            if kind not in (VIDEO, TEXT, PAD) or length < 0:
                raise ValueError(f"segments: {(kind, length)} is not accepted; a segment is one of {VIDEO}, {TEXT}, {PAD} and a length")
        runs = itertools.groupby((segment for segment in self.segments if segment[1]), key=lambda segment: segment[0])
        object.__setattr__(self, "segments", tuple((kind, sum(length for _, length in run)) for kind, run in runs))
        if not self.count(VIDEO):
            raise ValueError(f"segments: no video token among {self.segments}")

    @classmethod
    def of(cls, *segments: tuple[str, int], multiple: int = 1) -> "Sequence":
        """These segments, padded at the end to a multiple of the number of devices."""
        return cls((*segments, (PAD, -sum(length for _, length in segments) % multiple)))

    @classmethod
    def shared_out(cls, devices: int, *streams: tuple[str, int]) -> "Sequence":
        """Streams that were each padded to a multiple of the devices and cut, one after the other on each device: so lie the text
        and the video of HunyuanVideo's double blocks."""
        segments = []
        for device in range(devices):
            for kind, length in streams:
                share = -(-length // devices)
                here = min(max(length - device * share, 0), share)
                segments += [(kind, here), (PAD, share - here)]
        return cls(tuple(segments))

    @classmethod
    def rows_shared_out(cls, devices: int, frames: int, rows: int, columns: int) -> "Sequence":
        """A video whose rows were padded to a multiple of the devices and cut, in every frame: so does Cosmos-Predict2."""
        share = -(-rows // devices)
        here = [min(max(rows - device * share, 0), share) for device in range(devices)]
        return cls(tuple((kind, n * columns) for there in here for _ in range(frames) for kind, n in ((VIDEO, there), (PAD, share - there))))

    @property
    def tokens(self) -> int:
        """How many there are, padding too."""
        return sum(length for _, length in self.segments)

    @property
    def padding_behind(self) -> int:
        """How many of them are padding at the end."""
        kind, length = self.segments[-1]
        return length if kind == PAD else 0

    def count(self, kind: str) -> int:
        return sum(length for k, length in self.segments if k == kind)

    @cached_property
    def layout(self) -> Layout:
        """Of what `gather` returns."""
        start = 0
        for kind, length in self._gathered():
            if kind == VIDEO:
                break
            start += length
        return Layout(start, self.count(VIDEO))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Of `[B, H, N, D]` what counts, the video in one piece: a view where no token has to move, else a copy in x's memory order."""
        parts = self._slices
        if len(parts) == 1:
            return x[:, :, parts[0]]
        return torch.cat([x[:, :, part].transpose(1, 2) for part in parts], dim=1).transpose(1, 2)

    def scatter(self, out: torch.Tensor) -> torch.Tensor:
        """The inverse: `[B, H, N, D]`, zero at the padding. `out` itself where nothing has moved."""
        parts = self._slices
        if out.shape[2] == self.tokens and len(parts) == 1:
            return out
        b, h, _, d = out.shape
        whole = out.new_zeros(b, self.tokens, h, d).transpose(1, 2)
        start = 0
        for part in parts:
            length = part.stop - part.start
            whole[:, :, part] = out[:, :, start : start + length]
            start += length
        return whole

    def _gathered(self) -> list[tuple[str, int]]:
        """Kinds and lengths as `gather` orders them: as they are where the video is in one piece then, else the text first."""
        real = [segment for segment in self.segments if segment[0] != PAD]
        kinds = [kind for kind, _ in itertools.groupby(kind for kind, _ in real)]
        return real if kinds.count(VIDEO) == 1 else sorted(real, key=lambda segment: segment[0] == VIDEO)

    @cached_property
    def _slices(self) -> list[slice]:
        """Where these are, neighbours in one."""
        at, slices = 0, {TEXT: [], VIDEO: []}
        for kind, length in self.segments:
            if kind != PAD:
                slices[kind].append(slice(at, at + length))
            at += length
        merged: list[slice] = []
        for kind, _ in self._gathered():
            part = slices[kind].pop(0)
            if merged and merged[-1].stop == part.start:
                part = slice(merged.pop().start, part.stop)
            merged.append(part)
        return merged
