"""Frames of two videos and their difference, one under the other."""

import torch

from .canvas import THEMES, Canvas, fit
from .overlay import frames_shown

WIDTH, NAMES, GAP, SIZE = 1280, 40, 8, 18  # pixels; SIZE: of the font
NARROWEST, TALLEST = 165, 320  # pixels of a frame: wide enough for its caption, and no taller than that asks for


def draw_strip(
    reference: torch.Tensor, candidate: torch.Tensor, amplify: float, columns: int, captions: list[str]
) -> Canvas:
    """Rows: reference, candidate, |difference| x amplify.

    reference, candidate: `[F, H, W, C]` in 0..1; captions: one for each of the F frames.
    """
    shown = frames_shown(len(reference), columns)
    aspect = reference.shape[2] / reference.shape[1]
    width = int(max(NARROWEST, min((WIDTH - NAMES) / len(shown) - GAP, TALLEST * aspect)))
    height = max(1, round(width / aspect))
    top = 34
    canvas = Canvas(NAMES + (width + GAP) * len(shown), top + 3 * (height + GAP), THEMES["dark"])
    for column, i in enumerate(shown):
        x = NAMES + column * (width + GAP)
        canvas.text(x, 8, captions[i], SIZE, width=width)
        difference = (amplify * (candidate[i].float() - reference[i].float()).abs()).nan_to_num(1.0).clamp(max=1)
        for row, frame in enumerate((reference[i], candidate[i], difference)):
            canvas.picture(x, top + row * (height + GAP), fit(frame, width, height))
    for row, name in enumerate(("reference", "candidate", f"difference x {amplify:g}")):
        canvas.upright_text(NAMES / 2, top + row * (height + GAP) + height / 2, name, SIZE, canvas.theme.text)
    return canvas
