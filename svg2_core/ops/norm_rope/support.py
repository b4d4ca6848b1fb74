"""The choice of an implementation of these operations: self-tested on a small case before its first use, retired when it fails."""

import logging
import threading

import torch

from .. import registry
from . import DTYPES, layer_norm, rms_norm_rotary

BACKENDS = ("auto", "triton", "torch")
KEY = "norms and rotary embedding"  # under which the registry keeps the error of kernels that failed

log = logging.getLogger("svg2")
_tested: set[tuple[torch.device, torch.dtype]] = set()
_lock = threading.Lock()


def choose(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[str | None, str]:
    """-> (backend, "") or (None, why not). "auto" is Triton on an NVIDIA GPU, and plain torch on a CPU.

    Raises ValueError for a name that is not in BACKENDS.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend: {requested!r} is not accepted; it takes {', '.join(BACKENDS)}")
    if dtype not in DTYPES:
        return None, f"{dtype} is not float16, bfloat16 or float32"
    if requested == "torch" or (requested == "auto" and device.type == "cpu"):
        return "torch", ""
    refused = registry.triton_refusal(device)
    if refused is not None:
        return None, refused.detail
    if (device, dtype) not in _tested:
        _first_use(device, dtype)
    failed = registry.retired(KEY)
    return (None, f"triton: {failed}") if failed else ("triton", "")


def retire(error: BaseException) -> None:
    """No more Triton kernels of these operations in this process."""
    registry.retire(KEY, error)
    log.warning("SVG2: the fused kernels failed and are out of service; the model's own code goes on (%s)", error)


def _first_use(device: torch.device, dtype: torch.dtype) -> None:
    try:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            _self_test(device, dtype)
    except torch.OutOfMemoryError:  # says nothing about the kernels: tested again at the next call
        return
    except Exception as error:
        retire(error)
    with _lock:
        _tested.add((device, dtype))


def _self_test(device: torch.device, dtype: torch.dtype) -> None:
    """Raise RuntimeError where a kernel's result is not the definition's, computed on the CPU."""
    g = torch.Generator().manual_seed(0)
    x, factor, shift = (torch.randn(1, n, 192, generator=g).to(dtype) for n in (37, 1, 1))
    rotation = torch.randn(1, 1, 37, 32, 2, 2, generator=g)
    heads, weight = x.view(1, 37, 3, 64).transpose(1, 2), torch.randn(192, generator=g).to(dtype)
    cases = [(layer_norm, (x,), {"eps": 1e-6, "factor": factor, "shift": shift})]
    for pairs, over in (("interleaved", "token"), ("halves", "head")):
        row = weight if over == "token" else weight[:64]
        cases.append((rms_norm_rotary, (heads, row, rotation), {"eps": 1e-6, "pairs": pairs, "over": over}))
    for operation, tensors, settings in cases:
        expected = operation(*tensors, **settings).float()
        there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
        result = operation(*(t.to(device) for t in tensors), **there, backend="triton").float().cpu()
        error = ((result - expected).norm() / expected.norm()).item()
        if not error <= 2 * torch.finfo(dtype).eps:  # NaN fails too
            raise RuntimeError(f"{operation.__name__}: relative error {error:.1e} in the self-test")
