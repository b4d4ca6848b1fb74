"""The workspace of a call on a GPU (memory beside q, k, v and out): its limit, the bytes of one head, how many heads fit at a time."""

import time

import torch

LEAST_BYTES = 88 * 2**20  # of workspace, however little is free
FREE_MEMORY_DIVISOR = 4  # a call takes at most one part in so many of what is free
_SECONDS = 1.0  # for which a look at the free memory is good: it takes longer than a kernel's launch
_looked: dict[torch.device, tuple[float, int]] = {}


def work_memory(device: torch.device) -> int:
    """Bytes of workspace that a call on a GPU may use."""
    when, found = _looked.get(device, (-_SECONDS, 0))
    now = time.monotonic()
    if now - when >= _SECONDS:
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, given back by earlier calls
        found = max(LEAST_BYTES, (free + cached) // FREE_MEMORY_DIVISOR)
        _looked[device] = now, found
    return found


def bytes_per_head(tokens: int, c_q: int, c_k: int, head_dim: int, rank: int) -> int:
    """Peak workspace of one head of one batch row: in the near field, or during clustering."""
    persistent = 4 * tokens * 2 + 4 * c_q * c_k * 3 + c_q * c_k  # both permutations; log mass, variance, worth; the block map
    persistent += 4 * (c_q + 3 * c_k) * head_dim + 4 * 2 * head_dim * rank  # centroids, values, variances; projections
    granules = tokens // 16 + c_k
    near = 4 * granules * (16 + c_q) + 4 * tokens + 16 * head_dim * 32 * 4  # keys, granule lists; logsumexp; split-K partials of the exact rows
    clustering = 4 * tokens + 4 * (tokens // 256 + 1) * c_k + 4 * c_k * 2 * head_dim  # labels, counters
    matrices = 4 * head_dim * head_dim * (16 + 2 * 4)  # partial sums of products
    return persistent + max(near, clustering) + matrices


def heads_that_fit(tokens: int, c_q: int, c_k: int, head_dim: int, rank: int, rows: int, limit: int) -> int:
    """Heads of `rows` batch rows whose workspace stays within `limit` bytes; at least one."""
    return max(1, limit // (rows * bytes_per_head(tokens, c_q, c_k, head_dim, rank)))
