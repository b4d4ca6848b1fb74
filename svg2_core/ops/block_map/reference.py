"""The block map in plain torch, one head at a time: the definition that kernels are tested against."""

import torch


def block_map(
    q_centroids: torch.Tensor,
    k_centroids: torch.Tensor,
    k_sizes: torch.Tensor,
    top_p: float,
    least: int,
    scale: float,
) -> torch.Tensor:
    b, h, c_q, _ = q_centroids.shape
    c_k = k_centroids.shape[2]
    nonempty = k_sizes > 0
    if top_p >= 1:
        return nonempty[:, :, None, :].expand(b, h, c_q, c_k).contiguous()
    selected = torch.empty(b, h, c_q, c_k, dtype=torch.bool, device=q_centroids.device)
    for i in range(b):
        for j in range(h):
            # log(0) = -inf gives an empty cluster no mass.
            logits = scale * (q_centroids[i, j] @ k_centroids[i, j].T) + k_sizes[i, j].float().log()
            # Ranked by score, not by mass: masses that underflow to zero would tie with empty clusters.
            logits, rank = logits.sort(dim=-1, descending=True, stable=True)
            mass = logits.softmax(-1)
            before = mass.cumsum(-1) - mass  # mass already gathered when a cluster's turn comes
            keep = before < top_p
            keep[:, :least] = True
            keep[:, 0] = True
            selected[i, j] = torch.zeros_like(keep).scatter_(-1, rank, keep) & nonempty[i, j]
    return selected
