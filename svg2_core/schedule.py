"""The schedule of a run: which sampling steps and blocks stay dense, and why."""

import math
from dataclasses import dataclass

from .config import SVG2Config, in_block_ranges, parse_block_ranges
from .reasons import Reason


@dataclass(frozen=True)
class Schedule:
    """The dense and sparse parts of one sampling run.

    Decisions follow the sampler's own sigmas, not a count of calls: a sampler may evaluate the model twice per step
    (heun) or between two steps (dpm_2). An evaluation belongs to step i if its sigma lies in [sigmas[i], sigmas[i+1]),
    so heun's second evaluation, at the next step's sigma, counts as that next step.

    sigmas: the sampler's schedule of this run, its n + 1 values for n steps.
    continuation: the run begins from a half-done latent (a second stage, a partial denoise): it has no warm-up of its own.
    """

    sigmas: tuple[float, ...]
    config: SVG2Config
    continuation: bool = False

    @property
    def steps(self) -> int:
        return max(len(self.sigmas) - 1, 0)

    @property
    def warmup_steps(self) -> int:
        """Leading steps kept dense. A continuation has none; a generation has at least one unless the setting is 0."""
        if self.continuation:
            return 0
        if self.config.warmup_steps is not None:
            return self.config.warmup_steps
        if self.config.warmup_fraction == 0:
            return 0
        return max(1, round(self.config.warmup_fraction * self.steps))

    @property
    def end_step(self) -> int:
        """First step past end_percent."""
        return math.ceil(self.config.end_percent * self.steps - 1e-6)

    @property
    def last_sparse_step(self) -> int:
        """The last step that may be sparse; what is kept of only one step is kept of this one."""
        return self._first_of(min(self.end_step, self.steps) - 1)

    def step_of(self, sigma: float, since: int = 0) -> int:
        """Index of the step to which a model evaluation at `sigma` belongs; of several (a schedule may go back up, or repeat a
        value) the first that is not before step `since`, else the last. Steps without a change of sigma count as their first."""
        steps = [self._first_of(i) for i in range(self.steps) if self._covers(i, sigma)]
        nearest = min(range(max(self.steps, 1)), key=lambda i: abs(self.sigmas[i] - sigma))
        return next((step for step in steps if step >= since), steps[-1] if steps else self._first_of(nearest))

    def _covers(self, step: int, sigma: float) -> bool:
        """Whether a sigma lies in [sigmas[step], sigmas[step + 1]), in the direction in which the step goes; the first one begins,
        and the last one ends, as far out as need be."""
        here, there = self.sigmas[step : step + 2]
        sign = 1 if here > there else -1

        def reached(i: int) -> bool:
            # Samplers recompute sigmas through timesteps and logs, so a value may miss the schedule's by rounding: it has
            # reached sigmas[i] when it is within 1% of the step before it.
            return sign * (sigma - self.sigmas[i]) <= 0.01 * abs(self.sigmas[i - 1] - self.sigmas[i])

        return here != there and (step == 0 or reached(step)) and (step + 1 == self.steps or not reached(step + 1))

    def _first_of(self, step: int) -> int:
        """The first of the steps around this one that begin at the same sigma."""
        while step > 0 and self.sigmas[step - 1] == self.sigmas[step]:
            step -= 1
        return step

    def dense_step(self, step: int) -> Reason | None:
        """Why a whole step stays dense, or None."""
        if step < self.warmup_steps:
            return Reason.WARMUP
        if step >= self.end_step:
            return Reason.PAST_END
        return None

    def dense_block(self, block: int, total: int | None) -> Reason | None:
        """Why a block (0-based, of `total`) stays dense in every step, or None."""
        if in_block_ranges(parse_block_ranges(self.config.dense_blocks), block, total):
            return Reason.DENSE_BLOCK
        return None

    def config_of(self, block: int, total: int | None) -> SVG2Config:
        """The settings of a sparse block (0-based, of `total`): its share of the density."""
        if total is None or self.dense_block(0, total) is not None:
            return self.config  # where the first block is dense the others share equally
        sparse = sum(self.dense_block(other, total) is None for other in range(total))
        return self.config.of_block(block, sparse)
