"""The attention calls that are measured: one per model and resolution, with the published cluster counts."""

from dataclasses import dataclass
from math import prod

HEAD_DIM = 128


@dataclass(frozen=True)
class Shape:
    """One self-attention call, batch 1. grid: latent frames, rows and columns in tokens; text: tokens before the video."""

    name: str
    heads: int
    grid: tuple[int, int, int]
    q_clusters: int
    k_clusters: int
    text: int = 0

    @property
    def video(self) -> int:
        return prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.video + self.text


MAIN = Shape("wan-14b-720p", 40, (21, 45, 80), 300, 1000)
SHAPES = (
    MAIN,
    Shape("wan-14b-480p", 40, (21, 30, 52), 200, 1000),
    Shape("hunyuan-720p", 24, (33, 45, 80), 400, 1000, text=256),
    Shape("wan-1.3b-480p", 12, (21, 30, 52), 200, 1000),
    Shape("cosmos-704p", 32, (16, 44, 80), 400, 1000),
)
# The same heads and clusters, so that only the tokens grow.
GROWTH = tuple(Shape(f"growth-{t}-frames", 40, (t, 45, 80), 300, 1000) for t in (5, 9, 17, 21, 33))
# To exercise this program without a GPU; its times mean nothing.
TINY = Shape("tiny", 2, (4, 8, 10), 6, 20, text=7)
