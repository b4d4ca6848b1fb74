"""The demo's video without a server: the shipped checkpoint, its conditioning and its decoder, sampled in this process."""

import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "scripts" / "demo_nodes" / "models" / "svg2_demo_wan.safetensors"
_ALIAS = "svg2_demo_nodes"


def _nodes():
    if _ALIAS not in sys.modules:
        folder = ROOT / "scripts" / "demo_nodes"
        spec = importlib.util.spec_from_file_location(_ALIAS, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[_ALIAS] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_ALIAS])
    return importlib.import_module(f"{_ALIAS}.nodes")


def model(shift: float = 3.0):
    """A ModelPatcher of the checkpoint, fp32, with the flow shift it was trained with."""
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    patcher = comfy.sd.load_diffusion_model(str(CHECKPOINT), model_options={"dtype": torch.float32})
    return ModelSamplingSD3().patch(patcher, shift)[0]


def conditioning(prompt: str = "bunny", with_image: bool = True, width: int = 320, height: int = 192, length: int = 49):
    """(positive, negative, empty latent) of a video that starts from the bunny frame, or from text alone."""
    nodes = _nodes()
    image = nodes.DemoStartFrame.execute().result[0] if with_image else None
    positive, negative, latent = nodes.DemoConditioning.execute(prompt, width, height, length, image).result
    return positive, negative, latent["samples"]


def sample(patcher, seed: int = 1, steps: int = 20, case=None) -> torch.Tensor:
    """KSampler's euler, simple, cfg 1 on `case` (what `conditioning` returns); the latent."""
    import comfy.sample

    positive, negative, latent = case or conditioning()
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(patcher, noise, steps, 1.0, "euler", "simple", positive, negative, latent,
                               seed=seed, disable_pbar=True)  # fmt: skip


def frames(latent: torch.Tensor) -> torch.Tensor:
    """Decoded video `[F, H, W, 3]` in 0..1."""
    return _nodes().DemoDecode.execute({"samples": latent}).result[0]
