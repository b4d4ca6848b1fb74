"""Norms and rotary position embedding, each in one pass over memory.

All arithmetic is in fp32 and rounded once, to the result's dtype. Inputs are fp16, bf16 or fp32, of any strides.
The work is bound by memory: what is gained is what is not written and read again between a norm and what follows it.
"""

import torch

from ..implementations import implementation

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PAIRS = ("interleaved", "halves")
MAX_WIDTH = 16384  # of a row, which the kernels keep in registers


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float,
    factor: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * factor + shift, over the last dimension of `x` `[..., D]`.

    weight: `[D]`. factor, shift: the modulation, of shapes that broadcast to x's: one row for a batch row or a frame, or
        one for each token. What is None is left out. The result is contiguous, in the dtype that x, factor and shift
        promote to.

    Raises ValueError for shapes that do not fit, D above MAX_WIDTH, or dtypes other than fp16, bf16 and fp32.
    """
    return _norm(x, weight, None, eps, factor, shift, backend, centred=False)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    factor: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """((x - mean) / sqrt(variance + eps) * weight + bias) * factor + shift; otherwise as `rms_norm`. bias: `[D]`."""
    return _norm(x, weight, bias, eps, factor, shift, backend, centred=True)


def rotary(
    x: torch.Tensor,
    rotation: torch.Tensor,
    *,
    pairs: str,
    out: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """Rotate pairs of dimensions of `x` `[B, H, N, D]` by their token's position.

    rotation: 2 x 2 matrices `[B or 1, H or 1, N, D/2, 2, 2]`, any float dtype: a pair (a, b) becomes
        (r00 a + r01 b, r10 a + r11 b). How positions on a grid make angles is the model's business: it is in here.
    pairs: "interleaved", dimensions 2j and 2j + 1; or "halves", dimensions j and j + D/2.
    out: where to write, `[B, H, N, D]` of x's dtype and any strides; it must not overlap x. None: a new contiguous tensor.

    Raises ValueError for shapes that do not fit, an odd D, or dtypes other than fp16, bf16 and fp32.
    """
    return _rotary(x, None, rotation, 0.0, pairs, "", out, backend)


def rms_norm_rotary(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rotation: torch.Tensor,
    *,
    eps: float,
    over: str,
    pairs: str,
    out: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """`rms_norm` of the queries or keys `x` `[B, H, N, D]`, then `rotary`, in one pass.

    over: "head", each head's D values by themselves, weight `[D]`; or "token", all heads of a token together, weight
        `[H * D]`.

    Raises ValueError as `rms_norm` and `rotary` do.
    """
    if over not in ("head", "token"):
        raise ValueError(f'rms_norm_rotary: over is "head" or "token", got {over!r}')
    return _rotary(x, weight, rotation, eps, pairs, over, out, backend)


def _norm(x, weight, bias, eps, factor, shift, backend, centred) -> torch.Tensor:
    name = "layer_norm" if centred else "rms_norm"
    _check_input(name, x)
    for what, row in (("weight", weight), ("bias", bias)):
        if row is not None and row.shape != x.shape[-1:]:
            raise ValueError(f"{name}: {what} must be {list(x.shape[-1:])}, got {list(row.shape)}")
    dtype = x.dtype
    for what, term in (("factor", factor), ("shift", shift)):
        if term is None:
            continue
        _check_dtype(name, what, term)
        try:
            fits = torch.broadcast_shapes(term.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"{name}: {what} {list(term.shape)} does not broadcast to x {list(x.shape)}")
        dtype = torch.promote_types(dtype, term.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel():
        factor, shift = (None if term is None else term.expand(x.shape) for term in (factor, shift))
        implementation(__name__, backend).norm(x, weight, bias, eps, factor, shift, out, centred)
    return out


def _rotary(x, weight, rotation, eps, pairs, over, out, backend) -> torch.Tensor:
    name = "rms_norm_rotary" if over else "rotary"
    _check_input(name, x)
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"{name}: x must be [B, H, N, D] with an even D, got {list(x.shape)}")
    if pairs not in PAIRS:
        raise ValueError(f"{name}: pairs is {' or '.join(PAIRS)}, got {pairs!r}")
    b, h, n, d = x.shape
    if (
        rotation.dim() != 6
        or rotation.shape[2:] != (n, d // 2, 2, 2)
        or rotation.shape[0] not in (1, b)
        or rotation.shape[1] not in (1, h)
    ):
        raise ValueError(
            f"{name}: rotation must be [{b} or 1, {h} or 1, {n}, {d // 2}, 2, 2], got {list(rotation.shape)}"
        )
    if over == "token" and h * d > MAX_WIDTH:
        raise ValueError(f"{name}: {h * d} values of a token are more than {MAX_WIDTH}")
    width = h * d if over == "token" else d
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"{name}: weight must be [{width}], got {list(weight.shape)}")
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    elif out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(f"{name}: out must be {x.dtype} {list(x.shape)}, got {out.dtype} {list(out.shape)}")
    if out.numel():
        rotation = rotation.expand(b, h, n, d // 2, 2, 2)
        implementation(__name__, backend).rotary(x, weight, rotation, eps, pairs == "interleaved", over, out)
    return out


def _check_input(name: str, x: torch.Tensor) -> None:
    _check_dtype(name, "x", x)
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{name}: x must be [..., D] with D from 1 to {MAX_WIDTH}, got {list(x.shape)}")


def _check_dtype(name: str, what: str, x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: {what} is {x.dtype}, not float16, bfloat16 or float32")
