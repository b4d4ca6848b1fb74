"""Which sampling steps and blocks stay dense, and why."""

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
    continuation: the run continues another sampler's latent (a second stage): it has no warm-up of its own.
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
        return min(self.end_step, self.steps) - 1

    def step_of(self, sigma: float) -> int:
        """Index of the step to which a model evaluation at `sigma` belongs."""
        # Samplers recompute sigmas through timesteps and logs, so a value may miss the schedule's by rounding:
        # it has reached sigmas[i] when it is within 1% of the step before it. The sign serves rising schedules.
        sign = 1 if self.sigmas[0] >= self.sigmas[-1] else -1
        step = 0
        for i in range(1, self.steps):
            tolerance = 0.01 * abs(self.sigmas[i - 1] - self.sigmas[i])
            if sign * (sigma - self.sigmas[i]) <= tolerance:
                step = i
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
