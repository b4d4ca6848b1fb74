"""How much memory one head of a call needs beside q, k, v and out, and so how many heads fit at a time."""

# DESIGN allows 96 MiB for a Wan 720p call; what is left over is for the allocator's rounding.
LIMIT_BYTES = 88 * 2**20


def heads_that_fit(tokens: int, c_q: int, c_k: int, head_dim: int, rows: int, limit: int = LIMIT_BYTES) -> int:
    """Heads of `rows` batch rows whose index and work memory stays within `limit` bytes; at least one."""
    index = 4 * tokens * 3  # both cluster orders and the labels
    counters = 4 * (tokens // 256 + 1) * c_k
    centroids = (c_q + 2 * c_k) * head_dim * (4 + 4 + 2)  # of q, k and v: fp32, the last step's, the inputs' precision
    pairs = c_q * c_k * (1 + 4 + 3 * 4)  # the map, scores or its sum, the plan's three lists
    tiles = 4 * c_q * (tokens // 32 + 1)  # of 32 keys, the least of dynamic_attention/configs.py
    return max(1, limit // (rows * (index + counters + centroids + pairs + tiles)))
