"""What the Triton kernels share."""

import os

import torch
import triton
import triton.language as tl

# The CPU interpreter's bf16 dot returns garbage (triton 3.6 to 3.9): there, products are taken in fp32.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(1e9)  # that statistics take: fp32 still holds its fourth power


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a b in fp32 accumulation; fp32 inputs are multiplied as fp32, not as tf32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_onto(acc, a, b, UPCAST: tl.constexpr):
    """acc + a b, in acc's own registers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def finite(x):
    """fp32 x as statistics take it: zero for what is NaN or infinite, and at most 1e9."""
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


def block_of(size: int) -> int:
    """The block that holds so many channels, and is enough for a product on tensor cores."""
    return max(16, triton.next_power_of_2(size))


def products_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of inputs of `dtype` are multiplied: 16 bits with the range of fp32, or fp32."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability; the interpreter on a CPU takes sm_80's."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def stages_of_transposed(device: torch.device) -> int:
    """Stages of a loop whose product has a transposed factor from registers: Triton 3.6 compiles no pipeline of it for sm_100."""
    return 1 if capability_of(device)[0] == 10 else 2
