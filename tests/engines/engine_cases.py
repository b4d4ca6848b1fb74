"""Attention as video models have it on several GPUs: how much text and video, and in which order. Shared by the tests of this folder."""

from dataclasses import dataclass

import torch
from svg2_pack.svg2_core import Schedule, Session, SVG2Config
from svg2_pack.svg2_core.adapters import Sequence

SIGMAS = (1.0, 0.6, 0.0)
BLOCKS = 3
HEADS, HEAD_DIM = 4, 32
CONFIG = SVG2Config(
    density=0.3, q_clusters=6, k_clusters=12, kmeans_init_iters=2, kmeans_iters=1, warmup_fraction=0.0, min_tokens=0, dense_blocks=""
)


@dataclass(frozen=True)
class Case:
    """double: in so many first blocks, text and video are shared out apart."""

    text: int
    video: int
    double: int = 0


# Odd numbers: on two GPUs each needs padding.
CASES = {"wan": Case(0, 251), "h3": Case(20, 251), "hunyuan": Case(13, 251, double=1)}


def token_order(case: Case, block: int, gpus: int) -> Sequence:
    streams = ("text", case.text), ("video", case.video)
    return Sequence.shared_out(gpus, *streams) if block < case.double else Sequence.of(*streams, multiple=gpus)


def full(case: Case, step: int, block: int) -> list[torch.Tensor]:
    """q, k, v `[1, H, text + video, D]` of a block in a step, text first."""
    generator = torch.Generator().manual_seed(100 * step + block)
    drawn = [torch.randn(1, HEADS, case.text + case.video, HEAD_DIM, generator=generator) for _ in "qkv"]
    return [drawn[0] * 2, drawn[1] * 2, drawn[2]]


def session_of(config: SVG2Config) -> Session:
    return Session(Schedule(SIGMAS, config), backend="torch")
