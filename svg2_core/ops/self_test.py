"""One tiny case of every operation, compared with plain torch on the CPU, before a backend first serves a real call."""

import torch

from ..exact_rows import ExactRows
from ..layout import Layout
from .dynamic_attention import Tail, dynamic_attention
from .far_field import far_field
from .kmeans import Clusters, cluster_means, kmeans
from .moments import Moments, moments
from .near_field import near_field
from .registry import has_far_field
from .select import select_by_error, select_by_mass


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
    if has_far_field(backend):
        _near_and_far(q, k, v, q_groups, k_groups, layout, scale, tolerance, backend)
    else:
        _one_kernel(q, k, v, q_groups, k_groups, layout, scale, tolerance, backend)


def _near_and_far(q, k, v, q_groups, k_groups, layout, scale, tolerance, backend) -> None:
    """The stages after clustering, one upon the other, each compared with plain torch on what it was given."""
    on_cpu = [x.float().cpu() for x in (q, k, v)]
    theirs, expected_layout = (_to_cpu(q_groups), _to_cpu(k_groups)), Layout(11, 301)
    video = [x[:, :, layout.video] for x in (q, k, v)]
    settings = {"scale": scale, "directions": min(8, q.shape[3])}
    known = moments(*video, q_groups, k_groups, backend=backend, **settings)
    expected = moments(*(x[:, :, layout.video] for x in on_cpu), *theirs, **settings)
    for name in ("values", "log_mass", "variance", "spread"):
        _check(f"moments: {name}", getattr(known, name), getattr(expected, name), tolerance)
    selected, _ = select_by_error(q_groups, k_groups, known, density=0.3, scale=scale, backend=backend)
    expected, _ = select_by_error(*theirs, Moments(*(x.cpu() for x in known)), density=0.3, scale=scale)
    _check("select_by_error", selected.float(), expected.float(), 0.2)  # a pair at the threshold may fall to either side
    out, logsumexp = near_field(q, k, v, q_groups, k_groups, selected, layout=layout, scale=scale, backend=backend)
    expected = near_field(*on_cpu, *theirs, selected.cpu(), layout=expected_layout, scale=scale)
    _check("near_field", out, expected[0], tolerance)
    _check("near_field: logsumexp", logsumexp, expected[1], tolerance)
    rows = torch.arange(0, 300, 30, device=q.device).expand(2, -1)
    answers = torch.nn.functional.scaled_dot_product_attention(*(x.float() for x in video), scale=scale)[:, :, rows[0]]
    given = {"scale": scale, "order": 1}
    far_field(
        q, k, v, out, logsumexp, q_groups, k_groups, known, selected,
        layout=layout, exact=ExactRows(rows, answers), backend=backend, **given,
    )  # fmt: skip
    far_field(
        *on_cpu, *expected, *theirs, Moments(*(x.cpu() for x in known)), selected.cpu(),
        layout=expected_layout, exact=ExactRows(rows.cpu(), answers.cpu()), **given,
    )  # fmt: skip
    _check("far_field", out, expected[0], tolerance)


def _one_kernel(q, k, v, q_groups, k_groups, layout, scale, tolerance, backend) -> None:
    """Selection by mass, and the kernel that does near field and centroids in one."""
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
