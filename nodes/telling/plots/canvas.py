"""A page to draw on: themes, text that fits, hatching."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..similarity import rgb


@dataclass(frozen=True)
class Theme:
    """Colours by what they are for. series: two that colour-blind eyes tell apart (Okabe & Ito 2008)."""

    background: str
    text: str
    muted: str
    grid: str
    neutral: str
    hatch: str
    warning: str
    series: tuple[str, str]


THEMES = {
    "dark": Theme("#17191d", "#e8eaed", "#a3abb5", "#343a42", "#2b3037", "#66707c", "#ffb454", ("#56b4e9", "#e69f00")),
    "light": Theme("#ffffff", "#1b1e23", "#59616b", "#dfe3e8", "#eceff2", "#9aa3ad", "#a94f00", ("#0072b2", "#d98c00")),
}

# Line patterns that go on from one cell to the next: where (x, y) is on a line.
_PATTERNS = {
    "rising": lambda x, y: (x + y) % 10 < 2,
    "falling": lambda x, y: (x - y) % 10 < 2,
    "level": lambda x, y: (y % 7 < 2) & (x >= 0),
    "upright": lambda x, y: (x % 8 < 2) & (y >= 0),
    "crossed": lambda x, y: ((x + y) % 10 < 2) | ((x - y) % 10 < 2),
}


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def fit(frame: torch.Tensor, width: int, height: int) -> np.ndarray:
    """A frame `[H, W, C]` in 0..1 as uint8 `[height, width, 3]`: smoothly made smaller, or enlarged in whole pixels."""
    pixels = (rgb(frame).float().cpu().nan_to_num().clamp(0, 1) * 255).round().byte().numpy()
    method = Image.Resampling.NEAREST if width > pixels.shape[1] else Image.Resampling.BOX
    return np.array(Image.fromarray(pixels).resize((width, height), method))


class Canvas:
    """A picture of width x height pixels. Boxes are (left, top, right, bottom), right and bottom not included.

    The font that comes with Pillow has little beyond ASCII: write "x" for times and "-" for a range.
    """

    def __init__(self, width: int, height: int, theme: Theme):
        self.theme = theme
        self.image = Image.new("RGB", (width, height), theme.background)
        self._draw = ImageDraw.Draw(self.image)

    def box(self, box, color) -> None:
        left, top, right, bottom = (round(v) for v in box)
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill=color)

    def hatch(self, box, pattern: str, color: str | None = None) -> None:
        """Fill a box with neutral ground and lines."""
        left, top, right, bottom = (round(v) for v in box)
        if right <= left or bottom <= top:
            return
        self.box(box, self.theme.neutral)
        x, y = np.meshgrid(np.arange(left, right), np.arange(top, bottom))
        lines = Image.fromarray(np.where(_PATTERNS[pattern](x, y), 255, 0).astype(np.uint8))
        self._draw.bitmap((left, top), lines, fill=color or self.theme.hatch)

    def frame(self, box, color) -> None:
        """An outline of one pixel around the box."""
        left, top, right, bottom = (round(v) for v in box)
        self._draw.rectangle((left - 1, top - 1, right, bottom), outline=color)

    def text(self, x: float, y: float, words: str, size: int = 18, color: str | None = None, anchor: str = "la",
             width: float | None = None) -> float:  # fmt: skip
        """Write words at a Pillow anchor ("la": left, top), cut to `width` pixels with "...". -> pixels taken."""
        if width is not None and self.width_of(words, size) > width:
            while words and self.width_of(words + "...", size) > width:
                words = words[:-1]
            words = words.rstrip(" ,·") + "..."
        self._draw.text((round(x), round(y)), words, fill=color or self.theme.text, font=font(size), anchor=anchor)
        return self.width_of(words, size)

    def paragraph(
        self, x: float, y: float, words: str, width: float, size: int = 18, color: str | None = None
    ) -> float:
        """Write words in as many lines as they take. -> the y below them."""
        line = ""
        for word in words.split():
            longer = f"{line} {word}".strip()
            if line and self.width_of(longer, size) > width:
                self.text(x, y, line, size, color, width=width)
                y, longer = y + round(1.45 * size), word
            line = longer
        self.text(x, y, line, size, color, width=width)
        return y + round(1.45 * size)

    def upright_text(self, x: float, y: float, words: str, size: int = 18, color: str | None = None) -> None:
        """Write words from bottom to top, centred at (x, y)."""
        tile = Image.new("L", (round(self.width_of(words, size)) + 4, round(size * 1.5)))
        ImageDraw.Draw(tile).text((2, tile.height // 2), words, fill=255, font=font(size), anchor="lm")
        tile = tile.rotate(90, expand=True)
        self._draw.bitmap((round(x - tile.width / 2), round(y - tile.height / 2)), tile, fill=color or self.theme.muted)

    @staticmethod
    def width_of(words: str, size: int = 18) -> float:
        return font(size).getlength(words)

    def picture(self, left: float, top: float, pixels: np.ndarray) -> None:
        """Paste a picture, uint8 `[H, W, 3]`, as large as it is."""
        self.image.paste(Image.fromarray(pixels), (round(left), round(top)))

    def tensor(self) -> torch.Tensor:
        """The page as ComfyUI's IMAGE: fp32 `[1, H, W, 3]` in 0..1."""
        return torch.from_numpy(np.array(self.image)).float()[None] / 255
