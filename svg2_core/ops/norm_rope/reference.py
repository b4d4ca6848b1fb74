"""Norms and rotary embedding in plain torch: the definition that kernels are tested against."""

import torch


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    factor: torch.Tensor | None,
    shift: torch.Tensor | None,
    out: torch.Tensor,
    centred: bool,
) -> None:
    y = x.float()
    if centred:
        y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    if factor is not None:
        y = y * factor.float()
    if shift is not None:
        y = y + shift.float()
    out.copy_(y)


def rotary(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rotation: torch.Tensor,
    eps: float,
    interleaved: bool,
    over: str,
    out: torch.Tensor,
) -> None:
    """over: "head" or "token", the values that are normalised together; "" for no norm."""
    y = x.float()
    if over:
        squares = y.square().mean(-1, keepdim=True)
        if over == "token":
            squares = squares.mean(1, keepdim=True)  # heads are equally wide, so the mean of their means
        y = y * (squares + eps).rsqrt()
    if weight is not None:
        weight = weight.float()
        y = y * (weight.view(x.shape[1], 1, x.shape[3]) if over == "token" else weight)
    half = x.shape[-1] // 2
    a, b = (y[..., 0::2], y[..., 1::2]) if interleaved else (y[..., :half], y[..., half:])
    r = rotation.float()
    rotated = torch.stack(
        (r[..., 0, 0] * a + r[..., 0, 1] * b, r[..., 1, 0] * a + r[..., 1, 1] * b), -1 if interleaved else -2
    )
    out.copy_(rotated.flatten(-2))
