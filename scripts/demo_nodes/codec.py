"""The demo checkpoint's stand-in for a video VAE: a fixed 4x4 block DCT, the transform inside JPEG.

Wan's own VAE is a 500 MB download. The demo model was trained on these latents instead: 16 channels per 4x4
pixel block (the 10 lowest luma frequencies and the 3 lowest of each chroma plane), one latent frame per video
frame. It reconstructs the training clips at 32-37 dB. Only the demo uses it; the pack does not.
"""

import math

import torch

BLOCK = 4
CHANNELS = 16

# Luma and chroma frequencies kept, (vertical, horizontal), lowest first.
_LUMA = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (2, 1), (1, 2), (0, 3), (3, 0)]
_CHROMA = [(0, 0), (0, 1), (1, 0)]
_COMPONENTS = [(0, u, v) for u, v in _LUMA] + [(plane, u, v) for plane in (1, 2) for u, v in _CHROMA]

# 1.6 * std ** -0.6 of each channel over the training clips: a compromise between equal variance (which would
# spend the model's capacity on invisible high frequencies) and none (which would drown them in the sampler's noise).
_GAIN = torch.tensor([1.75, 4.9, 4.6, 7.5, 7.5, 7.3, 10.1, 10.1, 10.9, 10.9, 4.2, 15.0, 12.5, 5.2, 15.0, 12.5])

# ITU-R BT.601, full range.
_RGB_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def _dct_matrix() -> torch.Tensor:
    """Orthonormal DCT-II, `[BLOCK, BLOCK]`."""
    n = torch.arange(BLOCK, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * n[None] + 1) * n[:, None] / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    return basis.float()


def encode(frames: torch.Tensor) -> torch.Tensor:
    """Turn `frames` `[F, H, W, 3]` in 0..1 (H, W multiples of 4) into normalised latents `[16, F, H/4, W/4]`, fp32."""
    f, h, w, _ = frames.shape
    if h % BLOCK or w % BLOCK:
        raise ValueError(f"frames of {w}x{h} pixels: width and height must be multiples of {BLOCK}")
    ycc = frames.float() @ _RGB_TO_YCC.T
    ycc[..., 0] -= 0.5
    blocks = ycc.reshape(f, h // BLOCK, BLOCK, w // BLOCK, BLOCK, 3)
    d = _dct_matrix()
    coefficients = torch.einsum("ui,fhiwjc,vj->cuvfhw", d, blocks, d)
    return torch.stack([coefficients[c] for c in _COMPONENTS]) * _GAIN.view(-1, 1, 1, 1)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Invert `encode`: latents `[16, F, h, w]` into frames `[F, 4h, 4w, 3]`, clamped to 0..1, fp32."""
    _, f, h, w = latents.shape
    coefficients = latents.new_zeros(3, BLOCK, BLOCK, f, h, w, dtype=torch.float32)
    for value, component in zip(latents.float() / _GAIN.view(-1, 1, 1, 1), _COMPONENTS, strict=True):
        coefficients[component] = value
    d = _dct_matrix()
    ycc = torch.einsum("ui,cuvfhw,vj->fhiwjc", d, coefficients, d).reshape(f, h * BLOCK, w * BLOCK, 3)
    ycc[..., 0] += 0.5
    return (ycc @ torch.linalg.inv(_RGB_TO_YCC).T).clamp(0, 1)
