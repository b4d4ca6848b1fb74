"""Helpers shared by the Triton kernels and their launchers."""

import functools
import os

import torch
import triton
import triton.language as tl

# The CPU interpreter's bf16 dot returns garbage (triton 3.6 to 3.9): there, products are taken in fp32.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(1e9)  # that statistics take: fp32 still holds its fourth power
# Arguments that follow a video's size, prompt or settings. Triton specialises a kernel for integers that are 1 or divisible by 16;
# for these that gains nothing. (For strides it does: rows are copied 16 bytes at a time where these divide by 16.)
SIZES = (
    "n", "n_queries", "n_video", "n_text", "video_start", "samples", "count", "c", "c_q", "c_k", "c_count", "m_count", "h", "chunks", "step",
    "padded_keys", "tile_stride", "max_granules", "budget", "depth", "seed", "role", "first_head",
)  # fmt: skip
kernel = functools.partial(triton.jit, do_not_specialize=SIZES)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a b in fp32 accumulation; fp32 inputs are multiplied as fp32, not as tf32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_onto(acc, a, b, UPCAST: tl.constexpr):
    """acc + a b, accumulated in acc's registers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def product_of_rows(
    a, b, row, i, j, c_i, c_j, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """A tile of products a_i.b_j in fp32 of fp32 vectors `[rows, c, D]`, zero past their ends."""
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for first in range(0, D, BLOCK_D):
        dims = first + tl.arange(0, BLOCK_D)
        left = tl.load(a + (row * c_i + i)[:, None] * D + dims[None, :], mask=(i < c_i)[:, None] & (dims < D)[None, :], other=0.0)
        right = tl.load(b + (row * c_j + j)[None, :] * D + dims[:, None], mask=(j < c_j)[None, :] & (dims < D)[:, None], other=0.0)
        acc += dot(left, right, False)
    return acc


@triton.jit
def cluster_sizes(offsets, row, clusters, c):
    """Tokens of some of a row's c clusters, from their offsets; zero past the last."""
    first = offsets + row * (c + 1) + clusters
    inside = clusters < c
    return tl.load(first + 1, mask=inside, other=0) - tl.load(first, mask=inside, other=0)


@triton.jit
def logsumexp_step(row_max, row_sum, logits):
    """One step of an online logsumexp over the columns: -> row_max, row_sum, where the sum is row_sum * exp(row_max)."""
    new_max = tl.maximum(row_max, tl.max(logits, axis=1))
    row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(logits - new_max[:, None]), axis=1)
    return new_max, row_sum


@triton.jit
def finite(x):
    """fp32 x for statistics: zero for what is NaN or infinite, and clamped to a magnitude of 1e9."""
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


def cdiv(size: int, block: int) -> int:
    """Ceiling division; triton.cdiv takes several microseconds outside of a kernel."""
    return -(-size // block)


@functools.lru_cache
def block_of(size: int) -> int:
    """The block size for `size` channels: a power of two, and at least what a product on tensor cores takes."""
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
