"""Sparse attention as others compute it: ComfyUI's own at an error that is asked for, flashinfer's kernel on given clusters."""

from collections.abc import Callable

import torch

BLOCK = 64  # tokens of a position block of sol_attn
STEPS = 16  # of the bisection
LOWEST, HIGHEST = -8.0, 8.0  # sigmas of a row of block scores: nearly every block exact, nearly none


def sol_attention(text: int) -> Callable:
    """comfy-kitchen's `sol_attn` (0.2.33 and later; arXiv 2607.24027), what ComfyUI's Model Sparse Attention runs.

    INT8, fixed blocks of 64 tokens in the order of the sequence, pooled stand-ins for the others. -> attention(q, k, v, tau)
    of `[1, H, N, 128]`; a higher tau computes fewer blocks exactly. The first `text` tokens are exact both ways.
    Raises ImportError or AttributeError where it is not installed.
    """
    import comfy_kitchen

    attend = comfy_kitchen.sol_attn
    exact = [0, -(-text // BLOCK)] if text else None

    def attention(q, k, v, tau):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return attend(q, k, v, tau=tau, sink_blocks=exact, sink_q=exact).transpose(1, 2)

    return attention


def tau_for(error_at: Callable[[float], float], target: float) -> float:
    """The highest tau (fewest exact blocks) whose error is at most `target`, within 3% of it; LOWEST where none is."""
    low, high = LOWEST, HIGHEST
    for _ in range(STEPS):
        middle = (low + high) / 2
        error = error_at(middle)
        if error > target:
            high = middle
        else:
            low = middle
            if error >= 0.97 * target:
                break
    return low


def flashinfer_attention(device: torch.device) -> Callable:
    """flashinfer's variable block sparse attention, which SVG2's published code calls, on clusters and a map of pairs.

    -> attention(q, k, v, q_groups, k_groups, selected) of `[1, H, N, D]`, all tokens in clusters, skipped pairs dropped. It
    sorts q, k and v by cluster, plans (on the CPU, with a wait for the GPU), runs, and sorts back: all that a call needs.
    Raises ImportError where it is not installed.
    """
    from flashinfer import VariableBlockSparseAttentionWrapper

    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(128 * 2**20, dtype=torch.uint8, device=device))

    def attention(q, k, v, q_groups, k_groups, selected):
        heads, _, width = q.shape[1:]
        q_order, k_order = (groups.order[0].long()[..., None].expand(-1, -1, width) for groups in (q_groups, k_groups))
        sizes = [groups.sizes[0].int() for groups in (q_groups, k_groups)]
        wrapper.plan(selected[0], *sizes, heads, heads, width, sm_scale=width**-0.5, q_data_type=q.dtype, kv_data_type=q.dtype)
        sorted_out = wrapper.run(q[0].gather(1, q_order), k[0].gather(1, k_order), v[0].gather(1, k_order))
        return torch.empty_like(sorted_out).scatter_(1, q_order, sorted_out)[None]

    return attention
