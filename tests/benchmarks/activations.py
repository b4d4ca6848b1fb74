"""Queries, keys and values with the structure of a video model's, for any grid and any number of heads; torch only.

    q, k, v = activations(grid=(21, 45, 80), heads=40, device="cuda")

They follow twelve heads that capture.py recorded of the shipped checkpoint at 32,760 tokens: blocks 1, 3, 5, noise levels
0.8 and 0.4, two real clips (its `fit_head` makes data/activations.safetensors). Before RoPE, a head's q, k, v at a token
are a smooth field over the video plus noise that is Gaussian and independent between tokens, as the picture and the
sampler's noise are that they come from. Kept of each head, for q, k and v jointly:

- the field in cells of about 2 x 2 x 2 tokens, in its 40 main directions of 384: what is where, so the clusters, their
  sizes and runs, and which queries look for which keys;
- the noise's covariance (72 directions, each channel's variance kept) and its size in each cell: the clusters' radii.

A head is made by reading the field at the target grid's places (mirrored, rolled and bent, differently in each head),
adding fresh noise, and turning q and k by RoPE at the target's positions. More heads than twelve start from the same
fields again. Beyond 21 frames the field runs backwards. Values at 75,600 tokens and up are extrapolated from 32,760.

How well it is matched, means over the twelve heads, captures measured at the same grid (quality.py, QUALITY.md):

| generated over captured, less 1 | 3,120 | 12,480 | 32,760 | 75,600 tokens |
|---|---|---|---|---|
| error, clusters with stand-ins, density 0.05 / 0.2 | +18 / +9% | +8 / 0% | +1 / -3% | +1 / -2% |
| error, clusters, dropped, density 0.05 / 0.2 | -9 / -6% | -11 / -7% | -11 / -6% | -8 / -2% |
| variance within clusters of q / k / v | +5 / +9 / +13% | +4 / +7 / +9% | +4 / +5 / +6% | +3 / +2 / +3% |
| variance in 8 directions of q / k / v | +4 / +1 / -2% | +2 / 0 / -1% | +2 / 0 / 0% | 0 / +1 / +1% |
| size of the largest / smallest 5% of key clusters | +1 / -17% | +3 / -26% | +3 / -29% | +2 / -6% |
| keys that hold 0.5 / 0.9 of the attention | +8 / +7% | +8 / +6% | +9 / +6% | +7 / +5% |

Not matched: single heads (with stand-ins half of them are within 14%; with clusters and stand-ins the worst is off by 28%
from 32,760 tokens on and by 55% at 3,120; with skipped pairs dropped, position strips are off by up to 75%), the mean of
position strips whose skipped pairs are dropped (up to 25% too low), and whatever a model of 14 B parameters does that one
of 8 M does not, outlier channels above all.
"""

import json
import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

DATA = Path(__file__).parent / "data" / "activations.safetensors"
ROPE_AXES = (44, 42, 42)  # channels that turn with a token's frame, row and column: Wan's split of 128
FRAMES = 21  # that the stored fields span
_TEXT_VECTORS = 48


def activations(grid, heads, head_dim=128, text=0, dtype=torch.bfloat16, device="cpu", seed=0, token_major=False):
    """Make q, k, v `[1, heads, text + T * H * W, 128]` for a grid (T, H, W) of video tokens, text tokens first.

    token_major: in memory `[1, N, heads, 128]`, as Wan hands them over; otherwise contiguous as shaped. The same seed,
    shape and kind of device give the same values. Raises ValueError for a head_dim other than 128.
    """
    if head_dim != 128:
        raise ValueError(f"activations: the captures have heads of 128 channels, not {head_dim}")
    n = text + math.prod(grid)
    shape = (1, n, heads, 128) if token_major else (1, heads, n, 128)
    out = [torch.empty(shape, dtype=dtype, device=device) for _ in "qkv"]
    out = [x.transpose(1, 2) if token_major else x for x in out]
    captured, angles = load(str(device)), rope_angles(grid, device)
    for head in range(heads):
        source = {name: x[head % len(captured["mean"])] for name, x in captured.items()}
        on_device = torch.Generator(device).manual_seed(seed * 1_000_003 + head)
        on_cpu = torch.Generator().manual_seed(seed * 1_000_003 + head)
        for x, part in zip(out, _head(source, grid, angles, text, on_device, on_cpu), strict=True):
            x[0, head] = part.to(dtype)
    return tuple(out)


def _head(source, grid, angles, text, on_device, on_cpu):
    """q, k, v fp32 `[text + N, 128]` of one head."""
    device = source["mean"].device

    def normal(*shape):
        return torch.randn(*shape, generator=on_device, device=device)

    def tokens(content, size):
        noise = normal(len(content), source["noise"].shape[1]) @ source["noise"].T
        return source["mean"] + content @ source["basis"].T + size * noise

    places = _places(grid, on_cpu, device)
    video = tokens(_sample(source["field"], places), _sample(source["noise_size"][None], places))

    # A few dozen words, each repeated with hardly any change, as padded and similar prompts give; text is not turned.
    cells = source["field"].flatten(1).T
    words = tokens(cells[torch.randint(len(cells), (_TEXT_VECTORS,), generator=on_cpu).to(device)], 1)
    words = words[torch.arange(text, device=device) % _TEXT_VECTORS]
    words = words * (1 + 0.02 * normal(*words.shape))

    # One angle per pair of channels for all tokens: a rotation that tells heads apart, keeps every q.k, and leaves
    # large channels large, on which the error of quantised attention depends.
    turn_qk, turn_v = (2 * math.pi * torch.rand(64, generator=on_cpu).to(device) for _ in range(2))
    angles = torch.cat([torch.zeros(text, 64, device=device), angles])
    q, k, v = torch.cat([words, video]).split(128, dim=1)
    return rotate(q, angles + turn_qk), rotate(k, angles + turn_qk), rotate(v, turn_v)


def _places(grid, generator, device):
    """Where each token looks into the stored fields, `[T, H, W, 3]` as grid_sample wants them: (column, row, frame) in -1..1.

    The whole picture at any resolution, frame by frame as captured (beyond the last one backwards again). Each head sees
    it mirrored or not, rolled by any amount and bent a little.
    """
    axes = [
        (torch.arange(n, device=device) + 0.5) * 2 / span - 1 for n, span in zip(grid, (FRAMES, *grid[1:]), strict=True)
    ]
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    flip_y, flip_x, flip_t = (torch.randint(2, (3,), generator=generator) * 2 - 1).tolist()
    roll_y, roll_x, phase_y, phase_x = torch.rand(4, generator=generator).tolist()
    bend_y = 0.04 * torch.sin(math.pi * (2 * x + t) + 2 * math.pi * phase_y)
    bend_x = 0.04 * torch.sin(math.pi * (2 * y + t) + 2 * math.pi * phase_x)
    y, x = ((u + 2 * roll + 1) % 2 - 1 for u, roll in ((flip_y * y + bend_y, roll_y), (flip_x * x + bend_x, roll_x)))
    return torch.stack((x, y, flip_t * t), -1)


def _sample(field, places):
    """The field `[C, t, h, w]` between its cells, fp32 `[N, C]`."""
    found = F.grid_sample(field[None], places[None], mode="bilinear", padding_mode="reflection", align_corners=False)
    return found[0].flatten(1).T


def rope_angles(grid, device="cpu") -> torch.Tensor:
    """The angle by which rotary position embedding turns each pair of channels, fp32 `[T * H * W, 64]`."""
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = [
        place.reshape(-1, 1) * 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        for place, channels in zip(places, ROPE_AXES, strict=True)
    ]
    return torch.cat(parts, 1).float().to(device)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels of x `[N, 128]` as pairs by `angles` `[N, 64]` or `[64]`."""
    a, b = x.unflatten(-1, (64, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((cos * a - sin * b, sin * a + cos * b), -1).flatten(-2)


@lru_cache
def load(device: str = "cpu") -> dict[str, torch.Tensor]:
    """The stored heads, fp32: mean `[S, 384]`, field `[S, 40, t, h, w]`, basis `[S, 384, 40]`, noise `[S, 384, 72]`,
    noise_size `[S, t, h, w]`; 384 channels are q, k (before RoPE) and v of one head.
    """
    raw = _read_safetensors(DATA)
    scaled = {name: raw[name].float() * raw[f"{name}_scale"] for name in ("field", "basis", "noise", "noise_size")}
    return {name: x.to(device) for name, x in {"mean": raw["mean"], **scaled}.items()}


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors, without the safetensors package, which a machine that only measures does not have."""
    dtypes = {"I8": torch.int8, "U8": torch.uint8, "F32": torch.float32}
    blob = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    header.pop("__metadata__", None)
    return {
        name: torch.frombuffer(blob[start + about["data_offsets"][0] : start + about["data_offsets"][1]], dtype=dtypes[about["dtype"]])
        .reshape(about["shape"]).clone() for name, about in header.items()
    }  # fmt: skip
