"""The demo's learned decoder: latents to frames at twice the codec's size, token borders smoothed over.

The codec cuts a picture into blocks, and the model makes its latents token by token, 2 x 2 blocks each; what it is unsure of
differs from one to the next, and the fixed inverse shows every border. This network sees five tokens around and was trained to
give the real, larger frames from latents with errors of that kind (tests/models/train_demo_decoder.py).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import codec

WEIGHTS = Path(__file__).parent / "decoder.safetensors"
WIDTH, DEPTH = 48, 4
SCALE = 8  # pixels of a frame for one of the latent


def enlarged(latents: torch.Tensor) -> torch.Tensor:
    """Latents `[F, 16, h, w]` to frames `[F, 3, 8h, 8w]`: what the codec's inverse gives, enlarged."""
    plain = codec.decode(latents.movedim(0, 1)).movedim(-1, 1)
    return F.interpolate(plain, scale_factor=SCALE // codec.BLOCK, mode="bicubic")


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.gelu(self.first(F.gelu(x))))


class Decoder(nn.Module):
    """Latents `[F, 16, h, w]` to frames `[F, 3, 8h, 8w]`, about 0..1: what the codec's inverse gives, enlarged, and a correction."""

    def __init__(self):
        super().__init__()
        self.into = nn.Conv2d(codec.CHANNELS, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*(_Residual() for _ in range(DEPTH)))
        self.out = nn.Conv2d(WIDTH, 3 * SCALE**2, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return enlarged(latents) + F.pixel_shuffle(self.out(F.gelu(self.blocks(self.into(latents)))), SCALE)


def load() -> Decoder:
    from safetensors.torch import load_file

    decoder = Decoder()
    decoder.load_state_dict({name: x.float() for name, x in load_file(WEIGHTS).items()})
    return decoder.eval().requires_grad_(False)


def decode(latents: torch.Tensor, learned: bool) -> torch.Tensor:
    """Latents `[16, F, h, w]` to frames `[F, 8h, 8w, 3]` in 0..1, fp32: by the network, or by the codec's inverse alone."""
    decoder = load() if learned else enlarged
    frames = [decoder(frame[None].float()) for frame in latents.movedim(1, 0)]
    return torch.cat(frames).movedim(1, -1).clamp(0, 1).contiguous()
