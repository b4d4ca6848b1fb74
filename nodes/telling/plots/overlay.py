"""Clusters laid over the video: which tokens one attention head treats as alike, in space and time."""

import colorsys
import math

import numpy as np
import torch

from .canvas import Canvas, fit
from .heat_map import TICK

# Okabe & Ito 2008 without black and the second blue: told apart by colour-blind eyes.
SIX = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))


def many_colors(count: int) -> np.ndarray:
    """`count` colours, uint8 `[count, 3]`: hues by the golden ratio, three lightnesses for eyes that see few hues."""
    levels = ((0.95, 0.55), (0.75, 0.9), (0.45, 0.8))
    rgb = [colorsys.hsv_to_rgb(i * 0.618034 % 1, levels[i % 3][1], levels[i % 3][0]) for i in range(count)]
    return (np.array(rgb).reshape(-1, 3) * 255).round().astype(np.uint8)


def largest(labels: torch.Tensor, count: int = len(SIX)) -> list[int]:
    """The clusters with the most tokens, largest first."""
    sizes = torch.bincount(labels.flatten().long())
    order = torch.argsort(sizes, descending=True, stable=True)[:count]
    return [int(c) for c in order if sizes[c] > 0]


def frames_shown(latent_frames: int, most: int) -> list[int]:
    """Latent frames evenly from the first to the last."""
    count = min(most, latent_frames)
    return [round(i * (latent_frames - 1) / max(1, count - 1)) for i in range(count)]


def frame_of(latent_frame: int, latent_frames: int, frames: int) -> int:
    """The decoded frame at the same moment of the video as a latent frame."""
    return round(latent_frame * (frames - 1) / max(1, latent_frames - 1))


def enlarge(labels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Labels `[h, w]` -> `[height, width]`, each token as the patch it stands for."""
    rows = (np.arange(height) + 0.5) * labels.shape[0] / height
    columns = (np.arange(width) + 0.5) * labels.shape[1] / width
    return labels[rows.astype(int)][:, columns.astype(int)]


def borders(labels: np.ndarray) -> np.ndarray:
    """Where a pixel's right or lower neighbour is of another cluster."""
    found = np.zeros(labels.shape, dtype=bool)
    found[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    found[:-1] |= labels[:-1] != labels[1:]
    return found


def all_clusters(labels: np.ndarray, frame: np.ndarray | None, colors: np.ndarray) -> np.ndarray:
    """Every cluster in a colour of its own, half transparent over the frame (as high and wide as labels)."""
    picture = colors[labels].astype(float)
    if frame is not None:
        picture = 0.5 * picture + 0.5 * frame
    picture[borders(labels)] *= 0.45
    return picture.round().astype(np.uint8)


def chosen_clusters(labels: np.ndarray, frame: np.ndarray | None, chosen: list[int]) -> np.ndarray:
    """The chosen clusters in strong colours, all else in a dim grey of the frame."""
    grey = np.full(labels.shape, 70.0) if frame is None else 0.45 * (frame @ np.array([0.299, 0.587, 0.114])) + 20
    picture = np.repeat(grey[..., None], 3, axis=-1)
    for cluster, color in zip(chosen, SIX, strict=False):
        inside = labels == cluster
        light = 1.0 if frame is None else 0.55 + 0.45 * grey[inside][:, None] / 135
        picture[inside] = np.array(color, dtype=float) * light
    return picture.clip(0, 255).round().astype(np.uint8)


def draw_overlay(canvas: Canvas, labels: torch.Tensor, images: torch.Tensor | None, box) -> float:
    """Columns of frames; rows: the video (where given), all clusters, the largest ones. -> the y below them.

    labels: int16 `[T, h, w]`; images: IMAGE `[F, H, W, C]` in 0..1 or None; box: the space there is.
    """
    left, top, right, bottom = box
    rows = [("all clusters", all_clusters), (f"the {len(SIX)} largest", chosen_clusters)]
    if images is not None:
        rows.insert(0, ("video", None))
    aspect = images.shape[2] / images.shape[1] if images is not None else labels.shape[2] / labels.shape[1]
    gap, names = 10, 34
    tallest = (bottom - top - 28 - gap * (len(rows) - 1)) / len(rows)
    # As many columns as fill the page: few of a wide video, more of an upright one.
    shown = frames_shown(labels.shape[0], min(8, max(3, math.ceil((right - left - names) / (tallest * aspect + gap)))))
    widest = (right - left - names) / len(shown) - gap
    width = int(min(widest, tallest * aspect))
    height = int(width / aspect)
    colors, chosen = many_colors(int(labels.max()) + 1), largest(labels)

    for column, t in enumerate(shown):
        x = left + names + column * (width + gap)
        tokens = enlarge(labels[t].long().numpy(), width, height)
        frame, words = None, f"latent frame {t + 1} of {labels.shape[0]}"
        if images is not None:
            number = frame_of(t, labels.shape[0], len(images))
            frame = fit(images[number], width, height)
            words = f"frame {number + 1} of {len(images)}"
        canvas.text(x, top, words, TICK, canvas.theme.muted, width=width)
        for row, (_, paint) in enumerate(rows):
            y = top + 28 + row * (height + gap)
            picture = frame if paint is None else paint(tokens, frame, colors if paint is all_clusters else chosen)
            canvas.picture(x, y, picture)
    for row, (name, _) in enumerate(rows):
        canvas.upright_text(left + 12, top + 28 + row * (height + gap) + height / 2, name, TICK)
    return top + 28 + len(rows) * (height + gap)
