"""Where the video tokens of an attention call sit."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """Token layout of one call: `video_len` video tokens from index `video_start`; every other token is text.

    `text_bias`: additive fp32 logits of the text keys, `[B, N - video_len]` in token order (-inf drops a padded key),
    or None. Video tokens may be clustered; text tokens attend, and are attended to, exactly.
    """

    video_start: int
    video_len: int
    text_bias: torch.Tensor | None = None

    @property
    def video(self) -> slice:
        return slice(self.video_start, self.video_start + self.video_len)

    def text_index(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Indices of the text tokens among `tokens`, int64 `[tokens - video_len]`, ascending."""
        index = torch.arange(tokens - self.video_len, device=device)
        return index + self.video_len * (index >= self.video_start)

    def check(self, tokens: int) -> None:
        """Raise ValueError unless the video range lies within `tokens` and text_bias is `[B, tokens - video_len]`."""
        if self.video_start < 0 or self.video_len < 1 or self.video_start + self.video_len > tokens:
            raise ValueError(
                f"layout: video tokens {self.video_start}..{self.video_start + self.video_len} "
                f"do not lie within a sequence of {tokens}"
            )
        text = tokens - self.video_len
        if self.text_bias is not None and (self.text_bias.dim() != 2 or self.text_bias.shape[1] != text):
            raise ValueError(f"layout: text_bias must be [B, {text}], got {list(self.text_bias.shape)}")
