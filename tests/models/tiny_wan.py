"""Wan models of the host's exact architecture at test size, loaded through the host's normal loader."""

import torch


def random_wan(kind: str = "WanModel", layers: int = 3, seed: int = 0, **sizes):
    """A ModelPatcher of a Wan model with random weights: width 256, 2 heads of 128, fp32 on the CPU.

    kind: a class of comfy.ldm.wan.model; sizes: of its channels, such as in_dim.
    """
    import comfy.ldm.wan.model
    import comfy.ops
    import comfy.sd

    model = getattr(comfy.ldm.wan.model, kind)(
        **{"in_dim": 16, "out_dim": 16, **sizes}, dim=256, ffn_dim=512, num_heads=2, num_layers=layers,
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name, p in model.state_dict().items():
        # Scaled so that activations keep their size, and queries and keys are large enough for uneven attention.
        fan_in = p[0].numel() if p.dim() > 1 else p.numel()
        gain = 3.0 if "self_attn.norm" in name else 1.0
        weights[name] = torch.ones_like(p) * gain if "norm" in name and name.endswith("weight") else (
            torch.randn(p.shape, generator=g) * fan_in**-0.5)
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})


def conditioning(tokens: int = 7, seed: int = 0, **extra):
    """A conditioning as the host's nodes make it: text embeddings `[1, tokens, 4096]`."""
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, 4096, generator=g), dict(extra)]]


def latent(frames: int = 5, height: int = 16, width: int = 16, batch: int = 1, channels: int = 16) -> torch.Tensor:
    """An empty latent; 5 x 16 x 16 is 320 tokens."""
    return torch.zeros(batch, channels, frames, height, width)


@torch.no_grad()  # as the host runs a graph; the parameters of older hosts ask for gradients
def sample(model, steps=4, cfg=1.0, sampler="euler", scheduler="simple", seed=1, shape=None, positive=None,
           negative=None, denoise=1.0, noise=None, **kwargs):  # fmt: skip
    """Sample through the host's own `comfy.sample`, as KSampler does; the latent."""
    import comfy.sample

    x = latent() if shape is None else shape
    noise = comfy.sample.prepare_noise(x, seed) if noise is None else noise
    return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive or conditioning(), negative or conditioning(seed=9),
                               x, denoise=denoise, seed=seed, disable_pbar=True, **kwargs)  # fmt: skip
