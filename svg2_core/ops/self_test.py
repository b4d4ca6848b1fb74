"""The self-test of a backend before it first serves a call: one tiny case of every operation, compared with plain torch on the CPU."""

import torch

from ..layout import Layout
from .exact_rows import exact_rows, squared_error
from .far_field import far_field
from .kmeans import Clusters, LogitSpace, cluster_means, kmeans, kmeans_in, logit_spaces
from .kmeans.metric import points_in
from .moments import Moments, moments
from .near_field import near_field
from .report import exact_pairs
from .select import select_by_error


def self_test(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise RuntimeError naming the operation that gives a wrong result; any other error is the kernel's own."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        _run(backend, device, dtype, head_dim)


def _run(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 160, head_dim, generator=g).to(device, dtype) for _ in range(3))
    layout = Layout(video_start=11, video_len=137, text_bias=torch.zeros(1, 23, device=device))
    scale, tolerance = head_dim**-0.5, 1e-3 if dtype == torch.float32 else 2e-2
    q_groups, k_groups = (
        kmeans(x[:, :, layout.video], c, iterations=2, role=role, backend=backend) for role, (x, c) in enumerate(((q, 3), (k, 9)))
    )
    for x, groups in ((q, q_groups), (k, k_groups)):
        _check("kmeans", groups.centroids, cluster_means(x[:, :, layout.video].cpu(), _to_cpu(groups)), tolerance)
        if not torch.equal(groups.order.cpu().sort(-1).values, torch.arange(137, dtype=torch.int32).expand(1, 2, -1)):
            raise RuntimeError("kmeans: the order is not a permutation of the tokens")
    _clusters_in_spaces(*(x[:, :, layout.video] for x in (q, k)), scale, tolerance, backend)
    _near_and_far(q, k, v, q_groups, k_groups, layout, scale, tolerance, backend)


def _clusters_in_spaces(q, k, scale, tolerance, backend) -> None:
    """The metric and its clusters. Any basis of the leading directions will do, so what they catch is compared; and a warm start from
    these very clusters in the same space is where they are."""
    settings = {"rank": min(32, q.shape[3]), "scale": scale}
    found = logit_spaces(q, k, backend=backend, **settings)
    expected = logit_spaces(q.float().cpu(), k.float().cpu(), **settings)
    for role, x in enumerate((q, k)):
        tokens = x.float().cpu()
        caught, best = ((points_in(tokens, _on_cpu(space))).square().sum((2, 3)) for space in (found[role], expected[role]))
        _check("logit_spaces", caught, best, 5 * tolerance + 0.05)
        again = logit_spaces(q, k, past=tuple(space.projection for space in found), backend=backend, **settings)[role]
        clusters, points = kmeans_in(x, found[role], 5, iterations=1, role=role, backend=backend)
        _check("kmeans_in", clusters.centroids, cluster_means(tokens, _to_cpu(clusters)), tolerance)
        moved = points.cpu() @ again.transfer.cpu()
        _check("logit_spaces: transfer", moved, points_in(clusters.centroids.cpu(), _on_cpu(again)), 0.1)


def _on_cpu(space: LogitSpace) -> LogitSpace:
    return LogitSpace(*(None if x is None else x.cpu() for x in space))


def _near_and_far(q, k, v, q_groups, k_groups, layout, scale, tolerance, backend) -> None:
    """The stages after clustering, one upon the other, each compared with plain torch on what it was given."""
    on_cpu = [x.float().cpu() for x in (q, k, v)]
    cpu_clusters, expected_layout = (_to_cpu(q_groups), _to_cpu(k_groups)), Layout(11, 137)
    video = [x[:, :, layout.video] for x in (q, k, v)]
    settings = {"scale": scale, "directions": min(8, q.shape[3])}
    known = moments(*video, q_groups, k_groups, backend=backend, **settings)
    expected = moments(*(x[:, :, layout.video] for x in on_cpu), *cpu_clusters, **settings)
    for name in ("values", "log_mass", "variance", "spread"):
        _check(f"moments: {name}", getattr(known, name), getattr(expected, name), tolerance)
    selected, _ = select_by_error(q_groups, k_groups, known, density=0.3, scale=scale, backend=backend)
    expected, _ = select_by_error(*cpu_clusters, Moments(*(x.cpu() for x in known)), density=0.3, scale=scale)
    _check("select_by_error", selected.float(), expected.float(), 0.2)  # a pair at the threshold may fall to either side
    out, logsumexp = near_field(q, k, v, q_groups, k_groups, selected, layout=layout, scale=scale, backend=backend)
    expected = near_field(*on_cpu, *cpu_clusters, selected.cpu(), layout=expected_layout, scale=scale)
    _check("near_field", out, expected[0], tolerance)
    _check("near_field: logsumexp", logsumexp, expected[1], tolerance)
    sample = {"scale": scale, "seed": 0, "first_head": 0}
    exact, expected_rows = exact_rows(q, k, v, layout, backend=backend, **sample), exact_rows(*on_cpu, expected_layout, **sample)
    _check("exact_rows", exact.out, expected_rows.out, tolerance)
    given = {"scale": scale, "order": 1}
    far_field(
        q, k, v, out, logsumexp, q_groups, k_groups, known, selected, layout=layout, exact=exact, backend=backend, **given
    )  # fmt: skip
    far_field(
        *on_cpu, *expected, *cpu_clusters, Moments(*(x.cpu() for x in known)), selected.cpu(), layout=expected_layout, exact=expected_rows, **given
    )  # fmt: skip
    _check("far_field", out, expected[0], tolerance)
    squares = squared_error(exact, out, layout, backend=backend)
    _check("squared_error", squares[..., 1], squared_error(expected_rows, expected[0], expected_layout)[..., 1], 4 * tolerance)
    pairs = exact_pairs(q_groups, k_groups, selected, backend=backend)
    _check("exact_pairs", pairs, exact_pairs(*cpu_clusters, selected.cpu()), 1e-6)


def _to_cpu(clusters: Clusters) -> Clusters:
    return Clusters(*(x.cpu() for x in clusters))


def _check(name: str, result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = ((result.float().cpu() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:  # NaN fails too
        raise RuntimeError(f"{name}: relative error {error:.1e} in the self-test, more than {tolerance:.0e}")
