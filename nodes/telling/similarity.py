"""SSIM and LPIPS of two frames, as well-kept libraries compute them."""

from pathlib import Path

import torch

SSIM_WINDOW = 11  # pixels


def ssim(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of frames `[H, W, C]` with values in 0..1; 1 for equal frames.

    Gaussian window of sigma 1.5, over the pixels whose window lies inside the frame: what scikit-image gives with
    gaussian_weights and use_sample_covariance=False. kornia, which computes it, comes with ComfyUI.
    """
    from kornia.metrics import ssim as kornia_ssim  # a second to import: only where it is wanted

    x, y = (frame.float().movedim(-1, 0)[None].contiguous() for frame in (result, reference))
    return kornia_ssim(x, y, SSIM_WINDOW, eps=0.0, padding="valid").mean().item()


def load_lpips(frame: torch.Tensor):
    """LPIPS (Zhang et al. 2018) on AlexNet: `metric(result, reference) -> float` of `[H, W, C]` in 0..1 as large as `frame`.

    A str instead says why there is none. Nothing is ever downloaded: the backbone must be in torch's cache already.
    """
    try:
        from lpips import LPIPS
        from torchvision.models import AlexNet_Weights
    except ImportError as error:
        return f"the package {error.name} is not installed"
    weights = Path(torch.hub.get_dir(), "checkpoints", Path(AlexNet_Weights.IMAGENET1K_V1.url).name)
    if not weights.is_file():
        return f"AlexNet's weights ({weights.name}) are not in torch's cache, and nothing is downloaded"
    try:
        network = LPIPS(net="alex", verbose=False).to(frame.device).eval()
        with torch.no_grad():
            network(*torch.zeros(2, 1, 3, *frame.shape[:2], device=frame.device))
    except Exception as error:  # a damaged file, versions that do not go together, frames too small for the network
        return f"the package lpips failed ({type(error).__name__}: {error})"

    @torch.no_grad()
    def metric(result: torch.Tensor, reference: torch.Tensor) -> float:
        x, y = (rgb(frame).float().movedim(-1, 0)[None] * 2 - 1 for frame in (result, reference))
        return network(x, y).item()

    return metric


def rgb(frame: torch.Tensor) -> torch.Tensor:
    """`[..., 3]` of `[..., C]`: red, green, blue without what follows; of fewer channels (a mask), shades of grey by the first."""
    return frame[..., :3] if frame.shape[-1] >= 3 else frame[..., :1].expand(*frame.shape[:-1], 3)
