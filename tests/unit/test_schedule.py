"""Schedule: the step of every model evaluation, from sigmas alone, for samplers that evaluate once, twice or between."""

import math
from itertools import pairwise

import pytest
import torch
from svg2_pack.svg2_core.config import SVG2Config
from svg2_pack.svg2_core.reasons import Reason
from svg2_pack.svg2_core.schedule import Schedule

# Schedules, n steps: n + 1 values from high to zero.


def flow(shift):
    def sigmas(n):
        return [shift * t / (1 + (shift - 1) * t) for t in (1 - i / n for i in range(n + 1))]

    return sigmas


def karras(n):
    high, low = 14.6 ** (1 / 7), 0.03 ** (1 / 7)
    return [(high + i / max(n - 1, 1) * (low - high)) ** 7 for i in range(n)] + [0.0]


def beta(n):
    """Quantiles of Beta(1/2, 1/2): dense at both ends, shifted as Wan does."""
    times = [(1 + math.cos(math.pi * i / n)) / 2 for i in range(n + 1)]
    return [8 * t / (1 + 7 * t) for t in times]


def exponential(n):
    return [14.6 * (0.03 / 14.6) ** (i / max(n - 1, 1)) for i in range(n)] + [0.0]


SCHEDULES = {
    "flow1": flow(1),
    "flow3": flow(3),
    "flow8": flow(8),
    "karras": karras,
    "beta": beta,
    "exponential": exponential,
}
STEPS = [4, 5, 8, 20, 33, 50, 100]

# Samplers: (sigma of an evaluation, the step it belongs to), in the order of evaluation.


def euler(sigmas):
    return [(sigma, i) for i, sigma in enumerate(sigmas[:-1])]


def heun(sigmas):
    """Evaluates at the step's end too, unless that is zero; there, the evaluation counts as the next step's."""
    last = len(sigmas) - 2
    out = []
    for i in range(last + 1):
        out.append((sigmas[i], i))
        if sigmas[i + 1] != 0:
            out.append((sigmas[i + 1], min(i + 1, last)))
    return out


def dpm_2(sigmas):
    """Evaluates at the geometric mean of the step's ends too, unless one is zero."""
    out = []
    for i, (start, stop) in enumerate(pairwise(sigmas)):
        out.append((start, i))
        if start > 0 and stop > 0:
            out.append((math.sqrt(start * stop), i))
    return out


SAMPLERS = {"euler": euler, "heun": heun, "dpm_2": dpm_2}


def make(sigmas, continuation=False, **settings):
    return Schedule(tuple(sigmas), SVG2Config(**settings), continuation)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_evaluation_finds_its_step(sampler, schedule, steps):
    sigmas = SCHEDULES[schedule](steps)
    run = make(sigmas)
    assert run.steps == steps
    for sigma, step in SAMPLERS[sampler](sigmas):
        assert run.step_of(sigma) == step
        assert run.step_of(torch.tensor(sigma).item()) == step  # fp32, as the model call carries it
        for miss in (-3e-7, 3e-7):  # a few roundings, from a way through logs or timesteps
            assert run.step_of(sigma * (1 + miss)) == step


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_rising_schedules(sampler, steps):
    """Inversion runs from low to high."""
    sigmas = flow(3)(steps)[::-1]
    run = make(sigmas)
    for sigma, step in SAMPLERS[sampler](sigmas):
        assert run.step_of(sigma) == step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_second_stage_is_steps_of_its_own_list(schedule):
    sigmas = SCHEDULES[schedule](20)[12:]
    run = make(sigmas, continuation=True, warmup_steps=5)
    assert [run.step_of(sigma) for sigma in sigmas[:-1]] == list(range(8))
    assert [run.dense_step(step) for step in range(8)] == [None] * 8


def test_outside_the_schedule():
    """A sampler that adds noise evaluates above the first sigma; one may also ask at the very end."""
    run = make(flow(3)(10))
    assert run.step_of(5.0) == 0
    assert run.step_of(0.0) == 9
    assert run.step_of(-1.0) == 9


@pytest.mark.parametrize("sigmas", [[1.0, 0.0], [0.7, 0.7], [1.0]])
def test_short_lists(sigmas):
    assert make(sigmas).step_of(sigmas[0]) == 0


def dense_steps(run):
    return [step for step in range(run.steps) if run.dense_step(step) is not None]


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_warmup_in_steps(steps, warmup):
    run = make(flow(3)(steps), warmup_steps=warmup, warmup_fraction=0.9)
    assert dense_steps(run) == list(range(warmup))
    assert all(run.dense_step(step) is Reason.WARMUP for step in range(warmup))


def test_warmup_longer_than_the_run():
    assert dense_steps(make(flow(3)(4), warmup_steps=10)) == [0, 1, 2, 3]


@pytest.mark.parametrize("steps", range(1, 101))
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.2, 0.35])
def test_auto_warmup(steps, fraction):
    """The fraction of the steps to the nearest one, and never none."""
    warmup = len(dense_steps(make(flow(3)(steps), warmup_fraction=fraction)))
    assert warmup >= 1
    assert warmup == 1 or abs(warmup - fraction * steps) <= 0.5


def test_published_warmups():
    assert len(dense_steps(make(flow(5)(50), warmup_fraction=0.2))) == 10
    assert len(dense_steps(make(flow(5)(40), warmup_fraction=0.35))) == 14


def test_no_warmup():
    assert dense_steps(make(flow(3)(20), warmup_fraction=0.0)) == []
    assert dense_steps(make(flow(3)(20), warmup_steps=0)) == []


@pytest.mark.parametrize("settings", [{"warmup_steps": 10}, {"warmup_fraction": 0.5}])
def test_a_continuation_has_no_warmup(settings):
    assert dense_steps(make(flow(3)(20), continuation=True, **settings)) == []


@pytest.mark.parametrize(
    ("end", "steps", "dense"),
    [
        (1.0, 10, []),
        (0.5, 10, [5, 6, 7, 8, 9]),
        (0.55, 20, [*range(11, 20)]),  # in floats, 0.55 * 20 is a little more than 11
        (0.07, 100, [*range(7, 100)]),
        (0.5, 5, [3, 4]),  # the step in which the middle lies is still sparse
        (0.0, 4, [0, 1, 2, 3]),
    ],
)
def test_end_percent(end, steps, dense):
    run = make(flow(3)(steps), warmup_steps=0, end_percent=end)
    assert dense_steps(run) == dense
    assert all(run.dense_step(step) is Reason.PAST_END for step in dense)


def test_warmup_is_the_reason_where_both_apply():
    run = make(flow(3)(4), warmup_steps=2, end_percent=0.0)
    assert [run.dense_step(step) for step in range(4)] == [Reason.WARMUP] * 2 + [Reason.PAST_END] * 2


def test_heuns_second_evaluation_is_the_next_steps():
    """Two warm-up steps of heun: evaluations at s0, s1, s1 are dense; the second half of step 1, at s2, is sparse."""
    sigmas = flow(3)(6)
    run = make(sigmas, warmup_steps=2)
    dense = [run.dense_step(run.step_of(sigma)) is Reason.WARMUP for sigma, _ in heun(sigmas)]
    assert dense == [True, True, True] + [False] * 8


def test_dense_blocks():
    run = make(flow(3)(4), dense_blocks="0-1,-1")
    assert [block for block in range(6) if run.dense_block(block, 6) is Reason.DENSE_BLOCK] == [0, 1, 5]
    assert [block for block in range(6) if run.dense_block(block, 6) is None] == [2, 3, 4]
    assert run.dense_block(5, None) is None


def test_the_first_block_gets_a_larger_share_where_it_is_sparse():
    run = make(flow(3)(20), density=0.05, first_block_share=3.0, dense_blocks="")
    shares = [run.config_of(block, 40).density for block in range(40)]
    assert shares[0] == pytest.approx(0.15) and sum(shares) / 40 == pytest.approx(0.05)
    last_dense = make(flow(3)(20), density=0.05, first_block_share=3.0, dense_blocks="-2,-1")
    shares = [last_dense.config_of(block, 40).density for block in range(38)]
    assert sum(shares) / 38 == pytest.approx(0.05), "a mean over the blocks that are sparse"
    for equal in (make(flow(3)(20), density=0.05, first_block_share=3.0, dense_blocks="0"), make(flow(3)(20), density=0.05, dense_blocks="")):
        assert {equal.config_of(block, 40).density for block in range(1, 40)} == {0.05}
    assert run.config_of(0, None).density == 0.05


# Schedules that repeat a value or go back up, each evaluated once a step: steps in the order of evaluation.
ODD = {
    "first repeated": ([1.0, 1.0, 0.5, 0.0], [0, 0, 2]),
    "twice": ([1.0, 1.0, 0.5, 0.5, 0.0], [0, 0, 2, 2]),
    "three times": ([1.0, 1.0, 1.0, 0.4, 0.0], [0, 0, 0, 3]),
    "restart": ([1.0, 0.6, 0.3, 0.6, 0.3, 0.0], [0, 1, 2, 3, 4]),
    "rising": ([0.0, 0.3, 0.7, 1.0], [0, 1, 2]),
    "one value": ([1.0], [0]),
    "above the top": ([1.2, 0.8, 0.4, 0.0], [0, 1, 2]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_schedules(name):
    """Steps without a change of sigma are one with the step they lead to, so that a warm-up of one step is one that changes
    something."""
    sigmas, expected = ODD[name]
    schedule = Schedule(tuple(sigmas), SVG2Config(warmup_steps=1))
    steps = [0]
    for sigma in sigmas[: max(len(sigmas) - 1, 1)]:
        steps.append(schedule.step_of(sigma, since=steps[-1]))
    assert steps[1:] == expected
    assert [schedule.dense_step(step) is Reason.WARMUP for step in steps[1:]] == [step == 0 for step in expected]


def test_a_sampler_that_goes_back_finds_its_step_again():
    """An adaptive sampler rejects a step and evaluates at a higher sigma once more."""
    schedule = Schedule((1.0, 0.5, 0.2, 0.0), SVG2Config())
    assert schedule.step_of(0.5, since=2) == 1


def test_the_last_step_that_may_be_sparse_is_one_that_is_met():
    assert Schedule((1.0, 0.5, 0.5, 0.0), SVG2Config()).last_sparse_step == 1
