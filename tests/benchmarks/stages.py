"""The stages of a warm call one by one, as svg2_core/attention.py calls them, each to be checked before it is timed."""

import torch
import verify

STAGES = ("logit_spaces", "kmeans_in", "moments", "select_by_error", "near_field", "exact_rows", "far_field", "report")
BY_DENSITY = ("select_by_error", "near_field", "far_field", "report")  # what the others do is the same at every density
EXACT = 1e-2  # relative error of products in 16 bits
FAR = 2e-2  # of the merged far field, whose every term is made in 16 bits
SAMPLED = 0.05  # of statistics over a sample of the tokens
ASSIGNED = 0.15  # one warm iteration leaves so much to the next ones at most


class Part:
    """Some heads of a call: a method for each stage, which keeps what it finds for those that follow; and one that checks it.

    past: what the step before left, fp16 tensors of `Centroids`, of these heads."""

    def __init__(self, qkv, heads: slice, past, shape, layout, config, backend: str):
        self.q, self.k, self.v = (x[:, heads] for x in qkv)
        self.video = [x[:, :, layout.video] for x in (self.q, self.k, self.v)]
        self.past = [x[None, heads] for x in past.tensors()]
        self.shape, self.layout, self.config, self.backend, self.first = shape, layout, config, backend, heads.start
        self.scale = self.q.shape[3] ** -0.5
        self.of = {"scale": self.scale, "backend": backend}
        self.out = torch.empty_like(self.q)

    def run(self, stage: str) -> None:
        getattr(self, stage)()

    def check(self, stage: str, rows: torch.Tensor) -> float | None:
        """Raise WrongResult, or tell the relative error against fp32 arithmetic on what the stage was given, where it has one."""
        return getattr(self, f"check_{stage}")(f"{stage}, {self.backend}", rows)

    def logit_spaces(self) -> None:
        from svg2_pack.svg2_core.ops.kmeans import logit_spaces

        self.spaces = logit_spaces(*self.video[:2], rank=self.config.metric_directions, past=tuple(self.past[2:]), **self.of)

    def check_logit_spaces(self, name, rows):
        return verify.check_spaces(name, *self.video[:2], *(space.projection for space in self.spaces), self.scale, SAMPLED)

    def kmeans_in(self) -> None:
        self.groups = self.clusters(self.past[:2], self.config.kmeans_iters)

    def clusters(self, start, iterations: int) -> list:
        from svg2_pack.svg2_core.ops.kmeans import kmeans_in

        counts = (self.shape.q_clusters, self.shape.k_clusters)
        return [kmeans_in(x, space, count, init=init, iterations=iterations, role=role, first_head=self.first, backend=self.backend)[0]
                for role, (x, space, count, init) in enumerate(zip(self.video[:2], self.spaces, counts, start, strict=True))]  # fmt: skip

    def check_kmeans_in(self, name, rows):
        return self.check_clusters(name, self.groups)

    def check_clusters(self, name, both):
        found = zip("qk", self.video[:2], both, self.spaces, strict=True)
        return max(verify.check_clusters(f"{name} of {of}", x, groups, ASSIGNED, space.projection) for of, x, groups, space in found)

    def moments(self) -> None:
        from svg2_pack.svg2_core.ops.moments import moments

        self.known = moments(*self.video, *self.groups, directions=self.config.variance_directions, **self.of)

    def check_moments(self, name, rows):
        return verify.check_moments(name, *self.video, *self.groups, self.known, self.scale, 2 * EXACT, 2 * SAMPLED)

    def select_by_error(self) -> None:
        from svg2_pack.svg2_core.ops.select import select_by_error

        self.selected, self.foreseen = select_by_error(*self.groups, self.known, density=self.config.density, **self.of)

    def check_select_by_error(self, name, rows):
        verify.check_selection(name, *self.groups, self.known, self.selected, self.config.density, self.scale)

    def near_field(self) -> None:
        from svg2_pack.svg2_core.ops.near_field import near_field

        _, self.logsumexp = near_field(
            self.q, self.k, self.v, *self.groups, self.selected, layout=self.layout, out=self.out, **self.of
        )

    def truth(self, rows, far=None):
        return verify.sparse_rows(self.q, self.k, self.v, self.shape, rows, *self.groups, self.selected, far)

    def check_near_field(self, name, rows):
        truth, logsumexp = self.truth(rows)
        some = rows >= self.shape.text
        verify.check_logsumexp(name, self.logsumexp[:, :, rows[some] - self.shape.text], logsumexp[:, :, some], EXACT)
        return verify.check_attention(name, self.out, truth, rows, EXACT)

    def exact_rows(self) -> None:
        from svg2_pack.svg2_core.ops.exact_rows import exact_rows

        self.exact = exact_rows(self.q, self.k, self.v, self.layout, seed=0, first_head=self.first, **self.of)

    def check_exact_rows(self, name, rows):
        truth = verify.dense_rows(self.q, self.k, self.v, self.exact.rows + self.shape.text)
        return verify.check_error(name, self.exact.out, truth, EXACT)

    def far_field(self) -> None:
        """Into `out`, in place: once to be checked, then again and again to be timed, which takes as long."""
        from svg2_pack.svg2_core.ops.far_field import far_field

        self.shares = far_field(
            self.q, self.k, self.v, self.out, self.logsumexp, *self.groups, self.known, self.selected,
            layout=self.layout, order=1, exact=self.exact, **self.of,
        )  # fmt: skip

    def check_far_field(self, name, rows):
        truth, _ = self.truth(rows, (self.known, self.shares))
        return verify.check_attention(name, self.out, truth, rows, FAR)

    def report(self) -> None:
        from svg2_pack.svg2_core.ops.exact_rows import squared_error
        from svg2_pack.svg2_core.ops.report import exact_pairs, summary

        pairs = exact_pairs(*self.groups, self.selected, backend=self.backend)
        squares = squared_error(self.exact, self.out, self.layout, backend=self.backend)
        self.told = summary(
            pairs, squares, self.foreseen, all_pairs=self.shape.tokens**2, rows=self.exact.rows.shape[1], backend=self.backend
        )

    def check_report(self, name, rows):
        found = verify.at_rows(self.out, self.exact.rows + self.shape.text)
        error = verify.rel_l2(found, self.exact.out)
        verify.check_error(f"{name}: error", self.told.error, torch.as_tensor(error, device=self.q.device), EXACT)
        pairs = verify.pairs_of(*self.groups, self.selected).mean() / self.shape.tokens**2
        return verify.check_error(f"{name}: density", self.told.density, pairs, 1e-3)

    @property
    def density(self) -> float:
        """Pairs computed exactly over all pairs; those with a text token are all exact."""
        text = self.shape.tokens**2 - self.shape.video**2
        return ((verify.pairs_of(*self.groups, self.selected).mean() + text) / self.shape.tokens**2).item()
