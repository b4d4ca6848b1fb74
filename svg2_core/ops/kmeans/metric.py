"""The metric of k-means: a projection into a space in which distances are differences of logits.

A key k matters through its logits scale * q.k with the queries. Two keys whose difference is d differ by q.d at a query q, in
mean square d^T G d with G = E[q q^T]. So keys are clustered as points whose Euclidean distances are these (the metric G),
in the directions of it in which the keys vary most; queries likewise, in the metric of the keys' covariance.

Needs no square root and no eigenvectors of a symmetric matrix: `leading_directions` iterates products and a Cholesky
factorisation, a fixed number of times, one head at a time. The solvers of a library wait for the device, and round
differently by the size of a batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...precision import in_fp64
from ..by_head import by_head

# Of the subspace iteration. Four miss less than 1% of the variance that the exact eigenvectors catch (tests).
ITERATIONS = 4


class Centred(NamedTuple):
    """One head's tokens about their mean: fp32 `[N, D]`, and the mean `[D]`."""

    tokens: torch.Tensor
    mean: torch.Tensor


def centre(x: torch.Tensor) -> Centred:
    """Of tokens `[N, D]`, any float dtype. One that is not finite counts as zero."""
    x = finite(x)
    mean = x.mean(0)
    return Centred(x - mean, mean)


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """E[x x^T] of finite tokens `[N, D]` fp32: fp64 `[D, D]`, on the CPU where the device has no fp64.

    Products are fp32; the tokens' magnitude is taken out before, so that none underflows.
    """
    largest = largest_of(x)
    if x.is_cpu and 1e-9 < largest < 1e9:  # none can
        return in_fp64(x.T @ x) / len(x)
    largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
    x = x / largest
    return in_fp64(x.T @ x) * (in_fp64(largest).square() / len(x))


def largest_of(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in x, 0-d; NaN where there is one."""
    low, high = x.aminmax()
    return torch.maximum(-low, high)


_LARGEST = 1e9  # that statistics take: fp32 still holds its fourth power


def finite(x: torch.Tensor) -> torch.Tensor:
    """x in fp32 as statistics take it: zero for what is NaN or infinite, and at most 1e9. Not always a copy."""
    x = x.float()
    if x.is_cpu and x.numel() and largest_of(x) <= _LARGEST:  # a look costs less than a copy, and on a CPU no wait
        return x
    return x.nan_to_num(0.0, 0.0, 0.0).clamp_(-_LARGEST, _LARGEST)


def leading_directions(covariance: torch.Tensor, metric: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The directions in which points of a `covariance` vary most in a `metric`, both fp64 `[D, D]`.

    -> (P, Z), fp64 `[D, rank]`, where Z is orthonormal in the metric (Z^T G Z = 1) and P = G Z. Euclidean distances of points
    x P are those of the metric in these directions, and q.x = sum_m (q.z_m)(p_m.x) for x in their span. Leading ones come
    first. Of a covariance of lower rank, or zero, the columns that are left over have a norm of at most one: they do no harm.
    """
    # At their own magnitudes, no scale of the inputs over- or underflows.
    covariance = covariance / _magnitude(covariance)
    magnitude = _magnitude(metric)
    metric = metric / magnitude
    product = covariance @ metric
    jitter = torch.eye(rank, dtype=metric.dtype, device=metric.device) * 1e-13
    z = _start(len(metric), rank, metric.device)
    for _ in range(ITERATIONS):
        z = product @ _orthonormal(z, metric, jitter)
    z = _orthonormal(_orthonormal(z, metric, jitter), metric, jitter)  # twice: an ill-conditioned basis keeps a remainder
    return metric @ z * magnitude.sqrt(), z / magnitude.sqrt()


def _magnitude(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal().mean().clamp_min(1e-200)


def _orthonormal(z: torch.Tensor, metric: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
    z = z / z.norm(dim=0).clamp_min(1e-200)
    gram = z.T @ metric @ z
    # Without the check, cholesky_ex never waits for the device; the jitter keeps a singular basis factorisable.
    factor, _ = torch.linalg.cholesky_ex((gram + gram.T) / 2 + jitter)
    return torch.linalg.solve_triangular(factor, z.T, upper=False).T


def _start(d: int, rank: int, device: torch.device) -> torch.Tensor:
    """A fixed basis in general position, `[D, rank]`: cosines, the same on every device."""
    i, j = torch.arange(d, device=device).double(), torch.arange(rank, device=device).double()
    return torch.cos((i[:, None] + 0.5) * (j + 1.0) * (torch.pi / d)) + 0.1 * torch.cos((i[:, None] + 1) * (j + 2.0) ** 1.5)


class LogitSpace(NamedTuple):
    """Where the queries, or the keys, of all heads of a call are clustered: at (x - mean) projection, W numbers a token. fp32.

    projection `[B, H, D, W]`; mean `[B, H, D]`: of the tokens, or of a sample of them; transfer `[B, H, W, W]`: takes points of the past's space to
    where they are in this one, None without a past. largest `[B, H]`, projected_mean `[B, H, W]`: of kernels that project in 16 bits,
    the largest entry of the projection, and the mean so projected.
    """

    projection: torch.Tensor
    mean: torch.Tensor
    transfer: torch.Tensor | None
    largest: torch.Tensor | None = None
    projected_mean: torch.Tensor | None = None


def logit_spaces(q, k, rank: int, scale: float, past) -> tuple[LogitSpace, LogitSpace]:
    """See `logit_spaces` in `__init__.py`; one head at a time."""

    def of_head(q, k, *past):
        tokens = centre(q), centre(k)
        found = spaces(*tokens, rank, scale, past)
        return [field for space, x in zip(found, tokens, strict=True) for field in (space.projection, x.mean, space.transfer)]

    found = by_head(of_head, q, k, *past)
    return LogitSpace(*found[:3]), LogitSpace(*found[3:])


def points_in(x: torch.Tensor, space: LogitSpace) -> torch.Tensor:
    """Tokens `[B, H, N, D]` in a space, fp32 `[B, H, N, W]`, one head at a time."""
    return by_head(
        lambda x, mean, projection: project(Centred(finite(x) - mean, mean), projection), x, space.mean, space.projection
    )


class Space(NamedTuple):
    """Where one head's queries, or keys, are clustered. projection: fp32 `[D, W]`, takes tokens there; transfer: fp32
    `[W, W]`, takes points of an earlier space to where they are in this one, None without a past."""

    projection: torch.Tensor
    transfer: torch.Tensor | None


def spaces(
    q: Centred, k: Centred, rank: int, scale: float, past: Sequence[torch.Tensor | None] = (None, None)
) -> tuple[Space, Space]:
    """The spaces of logits of one head's queries and keys, in `rank` directions; past: the last call's projections, or None."""
    q_covariance, k_covariance = second_moment(q.tokens), second_moment(k.tokens)
    mean = in_fp64(q.mean)
    q_moment = q_covariance + mean[:, None] * mean
    found = []
    for role, (covariance, metric) in enumerate(((q_covariance, k_covariance), (k_covariance, q_moment))):
        projection = scale * leading_directions(covariance, metric, rank)[0]
        transfer = None if past[role] is None else _transfer(in_fp64(past[role]), projection, covariance).float()
        found.append(Space(*(x if x is None else x.to(q.tokens.device) for x in (finite(projection), transfer))))
    return tuple(found)


def _transfer(old: torch.Tensor, new: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """The regression, over tokens of a covariance, of their points in the new space on those in the old one: `[W, W]`."""
    covariance = covariance / _magnitude(covariance)
    gram = old.T @ covariance @ old
    jitter = gram.diagonal().mean() * 1e-9 + 1e-200
    factor, _ = torch.linalg.cholesky_ex(gram + jitter * torch.eye(len(gram), dtype=old.dtype, device=old.device))
    return torch.cholesky_solve(old.T @ covariance @ new, factor)


def project(x: Centred, projection: torch.Tensor) -> torch.Tensor:
    """One head's tokens in the space of a projection, about their mean: fp32 `[N, W]`.

    About the mean, so that a common offset costs no digits, and the past stays good when the offset moves.
    """
    return finite(x.tokens @ projection)
