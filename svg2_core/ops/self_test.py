"""One tiny case of every operation, compared with plain torch on the CPU, before a backend first serves a real call."""

import torch

from ..layout import Layout
from .dynamic_attention import Tail, dynamic_attention
from .kmeans import Clusters, cluster_means, kmeans
from .select import select_by_mass


def self_test(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise RuntimeError naming the operation that gives a wrong result; any other error is the kernel's own."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        _run(backend, device, dtype, head_dim)


def _run(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 331, head_dim, generator=g).to(device, dtype) for _ in range(3))
    layout = Layout(video_start=11, video_len=301, text_bias=torch.zeros(1, 30, device=device))
    scale, tolerance = head_dim**-0.5, 1e-3 if dtype == torch.float32 else 2e-2
    q_groups, k_groups = (
        kmeans(x[:, :, layout.video], c, iterations=2, role=role, backend=backend) for role, (x, c) in enumerate(((q, 5), (k, 19)))
    )
    for x, groups in ((q, q_groups), (k, k_groups)):
        _check("kmeans", groups.centroids, cluster_means(x[:, :, layout.video].cpu(), _to_cpu(groups)), tolerance)
        if not torch.equal(groups.order.cpu().sort(-1).values, torch.arange(301, dtype=torch.int32).expand(1, 2, -1)):
            raise RuntimeError("kmeans: the order is not a permutation of the tokens")
    settings = {"top_p": 0.5, "min_k_ratio": 0.1, "scale": scale}
    selected = select_by_mass(q_groups, k_groups, backend=backend, **settings)
    expected = select_by_mass(_to_cpu(q_groups), _to_cpu(k_groups), **settings)
    _check("select_by_mass", selected.float(), expected.float(), 0.2)  # a mass at the threshold may fall to either side
    tail = Tail(k_groups.centroids, cluster_means(v[:, :, layout.video], k_groups, backend=backend), k_groups.sizes.float().log())
    out = dynamic_attention(
        q, k, v, q_groups, k_groups, selected, layout=layout, scale=scale, tail=tail, backend=backend
    )
    expected = dynamic_attention(
        *(x.float().cpu() for x in (q, k, v)), _to_cpu(q_groups), _to_cpu(k_groups), selected.cpu(),
        layout=Layout(11, 301), scale=scale, tail=Tail(*(x.cpu() for x in tail)),
    )  # fmt: skip
    _check("dynamic_attention", out, expected, tolerance)


def _to_cpu(clusters: Clusters) -> Clusters:
    return Clusters(*(x.cpu() for x in clusters))


def _check(name: str, result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = ((result.float().cpu() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:  # NaN fails too
        raise RuntimeError(f"{name}: relative error {error:.1e} in the self-test, more than {tolerance:.0e}")
