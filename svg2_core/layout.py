"""The token layout of an attention call: which tokens are video."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """Token layout of one call: `video_len` video tokens from index `video_start`; every other token is text.

    `text_bias`: additive fp32 logits of the text keys, `[B, N - video_len]` in token order (-inf drops a padded key),
    or None. Video tokens may be clustered; text tokens attend, and are attended to, exactly.

    `queries`: where the queries are not those of the same tokens as the keys but a part of them (one frame, one window), the
    first video query and their count among the queries given; None where queries and keys have one layout.
    """

    video_start: int
    video_len: int
    text_bias: torch.Tensor | None = None
    queries: tuple[int, int] | None = None

    @property
    def video(self) -> slice:
        """The video's keys."""
        return slice(self.video_start, self.video_start + self.video_len)

    @property
    def video_queries(self) -> slice:
        """The video's queries."""
        start, length = self.queries or (self.video_start, self.video_len)
        return slice(start, start + length)

    @property
    def queries_len(self) -> int:
        """How many queries of the video there are."""
        return self.queries[1] if self.queries else self.video_len

    def text_index(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Indices of the text among `tokens` keys, int64 `[tokens - video_len]`, ascending."""
        return _outside(self.video, tokens, device)

    def text_queries(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Indices of the text among `tokens` queries, int64, ascending."""
        return _outside(self.video_queries, tokens, device)

    def check(self, queries: int, keys: int) -> None:
        """Raise ValueError unless the video lies within so many queries and keys, and text_bias is `[B, keys - video_len]`."""
        if self.queries is None and queries != keys:
            raise ValueError(f"layout: {queries} queries over {keys} keys: it must say which of the queries are the video's")
        for what, video, tokens in (("keys", self.video, keys), ("queries", self.video_queries, queries)):
            if video.start < 0 or video.stop <= video.start or video.stop > tokens:
                raise ValueError(f"layout: video tokens {video.start}..{video.stop} do not lie within a sequence of {tokens} {what}")
        text = keys - self.video_len
        if self.text_bias is not None and (self.text_bias.dim() != 2 or self.text_bias.shape[1] != text):
            raise ValueError(f"layout: text_bias must be [B, {text}], got {list(self.text_bias.shape)}")


def _outside(video: slice, tokens: int, device: torch.device) -> torch.Tensor:
    length = video.stop - video.start
    index = torch.arange(tokens - length, device=device)
    return index + length * (index >= video.start)
