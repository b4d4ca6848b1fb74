"""Triton device function of cold_start.seed_tokens, one token at a time."""

import triton
import triton.language as tl


@triton.jit
def hashed_token(i, n, count, seed, role, head):
    """The seed token in the i-th (int64) of `count` equal segments of n tokens."""
    first = i * n // count
    key = first
    for salt in tl.static_range(5):
        if salt == 0:
            value = i * 0 + seed
        elif salt == 1:
            value = i * 0 + role
        elif salt == 2:
            value = i * 0 + head
        elif salt == 3:
            value = i * 0 + n
        else:
            value = i * 0 + count
        key = mix((key + ((value * 0x9E3779B9) & 0xFFFFFFFF)) & 0xFFFFFFFF)
    return first + key % ((i + 1) * n // count - first)


@triton.jit
def mix(h):
    """cold_start._mix: a 32-bit finaliser in int64."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)
