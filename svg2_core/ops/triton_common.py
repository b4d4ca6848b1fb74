"""What the Triton kernels share."""

import os

import triton
import triton.language as tl

# The CPU interpreter's bf16 dot returns garbage (triton 3.6 to 3.9): there, products are taken in fp32.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a b in fp32 accumulation; fp32 inputs are multiplied as fp32, not as tf32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
