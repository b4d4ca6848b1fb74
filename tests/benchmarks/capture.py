"""Record attention inputs of the shipped checkpoint on real clips, from the demo's size to Wan's 720p.

    python tests/benchmarks/capture.py record --clips DIR --captures DIR [--tokens 32760] [--clip bunny] [--sigma 0.8]
    python tests/benchmarks/capture.py fit --captures DIR     # makes data/activations.safetensors from them

The clips are those of tests/models/train_tiny_wan.py (its docstring says where they are from), which also says how a
training example is made; a capture is one such example at a larger size: a window of a clip through the demo's codec,
noise added at a flow sigma, the first frame given, one forward pass. The blocks' dense attention runs in bf16.

A capture holds q, k, v `[2, N, 128]` fp16 of one block's self-attention, as attention gets them (after RoPE), in
DIR/{clip}_{tokens}_{sigma}_{block}.safetensors. They are large and stay out of git. On two
busy cores a forward pass of 32,760 tokens takes half a minute, one of 75,600 three to five.
"""

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from activations import DATA, rope_angles, rotate
from common import start

# (T, H, W) of the video tokens; N = T * H * W. A token is 2 x 2 latent pixels of 4 x 4 pixels each.
GRIDS = {3120: (13, 12, 20), 12480: (13, 24, 40), 32760: (21, 30, 52), 75600: (21, 45, 80)}
CLIPS = ("bunny", "bikes")
SIGMAS = (0.8, 0.4)
BLOCKS = (1, 3, 5)
FIT_TOKENS = 32760
CELLS = (11, 15, 26)
FIELD_RANK, NOISE_RANK = 40, 72


def clean_latent(training, clips: Path, clip: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """Latents `[16, T, 2H, 2W]` fp32 of a window in the middle of the clip's longest shot."""
    video = training.read_clip(clips / training.CLIPS[clip])
    starts = training.scene_starts(video, grid[0])
    runs = [list(run) for _, run in itertools.groupby(enumerate(starts), lambda pair: pair[1] - pair[0])]
    longest = max(runs, key=len)
    first = longest[len(longest) // 2][1]
    window = video[first : first + grid[0] * training.FRAME_STRIDE : training.FRAME_STRIDE]
    h, w = (2 * n * training.codec.BLOCK for n in grid[1:])
    scale = max(h / window.shape[1], w / window.shape[2])
    size = (math.ceil(window.shape[1] * scale), math.ceil(window.shape[2] * scale))
    x = F.interpolate(window.permute(0, 3, 1, 2).float() / 255, size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    return training.codec.encode(x[:, :, top : top + h, left : left + w].permute(0, 2, 3, 1).clamp(0, 1))


class _LastBlockReached(Exception):
    """Nothing after the last recorded block's inputs is needed."""


@torch.no_grad()
def record(model, training, clean: torch.Tensor, sigma: float, clip: str, seed: int = 0) -> dict[int, dict]:
    """q, k, v `[2, N, 128]` fp16 of each block's self-attention in one forward pass of `clean` at noise `sigma`."""
    recorded = {}

    def attention(func, q, k, v, heads, **kwargs):
        if q.shape != k.shape:
            return func(q, k, v, heads, **kwargs)
        block = kwargs["transformer_options"]["block_index"]
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        if block in BLOCKS:
            recorded[block] = {name: x[0].half().contiguous() for name, x in zip("qkv", (q, k, v), strict=True)}
        if block == BLOCKS[-1]:
            raise _LastBlockReached
        out = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        return out.transpose(1, 2).flatten(2).float()

    noise = torch.randn(clean[None].shape, generator=torch.Generator().manual_seed(seed))
    inputs = training.model_input(sigma * noise + (1 - sigma) * clean[None], clean[None], with_image=True)
    try:
        model(inputs, torch.tensor([sigma * 1000]), training.prompt_vector(clip),
              transformer_options={"optimized_attention_override": attention})  # fmt: skip
    except _LastBlockReached:
        return recorded


def record_all(args) -> None:
    from safetensors.torch import save_file

    start()
    import demo_video
    import train_tiny_wan as training

    model = demo_video.model().model.diffusion_model
    args.captures.mkdir(parents=True, exist_ok=True)
    for tokens, clip in itertools.product(args.tokens, args.clip):
        clean = clean_latent(training, args.clips, clip, GRIDS[tokens])
        for sigma in args.sigma:
            began = time.time()
            for block, qkv in record(model, training, clean, sigma, clip).items():
                save_file(qkv, args.captures / f"{clip}_{tokens}_{sigma}_{block}.safetensors")
            print(f"{clip} {tokens} tokens, sigma {sigma}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)


def stored_heads() -> list[tuple[str, float, int, int]]:
    """(clip, sigma, block, head) of the heads that activations.py starts from: both clips, in turn."""
    return [(CLIPS[head], sigma, block, head) for sigma in SIGMAS for block in BLOCKS for head in (0, 1)]


def load_head(captures: Path, clip: str, tokens: int, sigma: float, block: int, head: int):
    """q, k, v fp32 `[N, 128]` of one captured head."""
    from safetensors import safe_open

    with safe_open(captures / f"{clip}_{tokens}_{sigma}_{block}.safetensors", "pt") as file:
        return tuple(file.get_slice(name)[head].float() for name in "qkv")


def fit_head(q, k, v, grid) -> dict[str, torch.Tensor]:
    """What activations.py needs of one head, fp32: see `activations.load`.

    Before RoPE, and with v, a head's tokens are a smooth field over the video plus noise that is as good as independent
    between tokens and Gaussian (lag-1 correlation 0.0 to 0.2, kurtosis 3.0 to 4.0): the picture, and the sampler's noise
    after it went through the model. The field is kept in cells of about 2 x 2 x 2 tokens and its main directions, the noise as
    the factor of its covariance with its size in each cell.
    """
    angles = rope_angles(grid)
    x = torch.cat([rotate(q, -angles), rotate(k, -angles), v], 1)
    mean = x.mean(0)
    x = (x - mean).T.reshape(1, 384, *grid)
    cells = F.adaptive_avg_pool3d(x, CELLS)
    noise = (x - F.interpolate(cells, size=grid, mode="trilinear"))[0]
    power = noise.pow(2).sum(0)[None, None]
    size = (F.adaptive_avg_pool3d(power, CELLS)[0, 0] / power.mean()).sqrt()

    _, _, basis = torch.pca_lowrank(cells[0].flatten(1).T, FIELD_RANK, center=False, niter=8)
    field = (basis.T @ cells[0].flatten(1)).reshape(FIELD_RANK, *CELLS)
    noise = noise.flatten(1)
    values, vectors = torch.linalg.eigh((noise @ noise.T).double() / noise.shape[1])
    factor = (vectors[:, -NOISE_RANK:] * values[-NOISE_RANK:].sqrt()).float()
    # Each channel keeps its variance: what the directions left out would have added is spread over those kept.
    factor *= (noise.pow(2).mean(1) / factor.pow(2).sum(1)).sqrt()[:, None]
    return {"mean": mean, "field": field, "basis": basis.contiguous(), "noise": factor, "noise_size": size}


def _quantised(x: torch.Tensor, dims) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values and the fp32 scale that they share over `dims`."""
    scale = x.abs().amax(dims, keepdim=True) / 127
    return (x / scale).round().to(torch.int8), scale


def fit_all(args) -> None:
    from safetensors.torch import save_file

    heads = [fit_head(*load_head(args.captures, clip, FIT_TOKENS, *rest), GRIDS[FIT_TOKENS])
             for clip, *rest in stored_heads()]  # fmt: skip
    stacked = {name: torch.stack([head[name] for head in heads]) for name in heads[0]}
    tensors = {"mean": stacked["mean"]}
    for name, dims in {"field": (2, 3, 4), "basis": 1, "noise": (1, 2), "noise_size": (1, 2, 3)}.items():
        tensors[name], tensors[f"{name}_scale"] = _quantised(stacked[name], dims)
    DATA.parent.mkdir(exist_ok=True)
    save_file(tensors, DATA)
    print(f"wrote {DATA.name}: {DATA.stat().st_size / 1e6:.2f} MB", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "fit"])
    parser.add_argument("--captures", type=Path, required=True, help="folder of the captures")
    parser.add_argument("--clips", type=Path, help="folder of the clips (train_tiny_wan.py says where they are from)")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GRIDS))
    parser.add_argument("--clip", nargs="+", default=list(CLIPS))
    parser.add_argument("--sigma", type=float, nargs="+", default=list(SIGMAS))
    args = parser.parse_args()
    {"record": record_all, "fit": fit_all}[args.action](args)


if __name__ == "__main__":
    main()
