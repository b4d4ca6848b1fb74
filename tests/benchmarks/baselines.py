"""Dense attention as others compute it, each if it is installed: the fastest of them is what a sparse call has to beat."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Baseline:
    """make: -> attention of q, k, v `[B, H, N, D]`; raises ImportError or AttributeError where it is not installed."""

    name: str
    make: Callable[[], Attention]
    exact: bool = True  # in the inputs' precision; a quantised one is a baseline at its own error


def _sdpa(backend: SDPBackend) -> Callable[[], Attention]:
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return lambda: attention


def _tokens_first(module: str, function: str) -> Callable[[], Attention]:
    """Of flash-attn's family: `[B, N, H, D]`, and a tuple from some versions."""

    def make():
        flash = getattr(importlib.import_module(module), function)

        def attention(q, k, v):
            out = flash(*(x.transpose(1, 2) for x in (q, k, v)))
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return attention

    return make


def _heads_first(module: str, function: str) -> Callable[[], Attention]:
    return lambda: getattr(importlib.import_module(module), function)


BASELINES = (
    Baseline("torch flash", _sdpa(SDPBackend.FLASH_ATTENTION)),
    Baseline("torch cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Baseline("torch efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    Baseline("flash-attn 2", _tokens_first("flash_attn", "flash_attn_func")),
    Baseline("flash-attn 3", _tokens_first("flash_attn_interface", "flash_attn_func")),
    Baseline("flash-attn 4", _tokens_first("flash_attn.cute", "flash_attn_func")),
    Baseline("SageAttention", _heads_first("sageattention", "sageattn"), exact=False),
    Baseline("comfy-kitchen INT8", _heads_first("comfy_kitchen.sage_attention", "int8_attention"), exact=False),
)


def available() -> tuple[dict[str, Attention], dict[str, str]]:
    """Those that can be imported, and why the others cannot."""
    found, missing = {}, {}
    for baseline in BASELINES:
        try:
            found[baseline.name] = baseline.make()
        except (ImportError, AttributeError, OSError) as error:
            missing[baseline.name] = str(error)
    return found, missing


def flash_kmeans() -> Callable | None:
    """flash-kmeans' Lloyd iterations of x `[rows, N, D]` from given centroids, or None where it is not installed."""
    try:
        from flash_kmeans import batch_kmeans_Euclid
    except (ImportError, OSError):
        return None
    return lambda x, init, iterations: batch_kmeans_Euclid(
        x, init.shape[1], max_iters=iterations, tol=-1.0, init_centroids=init
    )
