"""Warm-up and end follow the sampler's own sigmas, in the host's own samplers and schedulers."""

import pytest
import torch
from tiny_wan import latent, sample


def dense_and_sparse_steps(report):
    return [s.index for s in report.steps if not s.sparse], [s.index for s in report.steps if s.sparse]


@pytest.mark.parametrize(
    "sampler, scheduler",
    [("euler", "karras"), ("heun", "simple"), ("dpm_2", "beta"), ("uni_pc", "beta"), ("dpmpp_2m", "simple"), ("dpmpp_sde", "karras"),
     ("res_multistep", "beta"), ("lcm", "simple")],
)  # fmt: skip
def test_the_first_steps_are_dense_in_every_sampler(wan, svg2, sampler, scheduler):
    patched, stats = svg2(wan, warmup_steps=2, dense_blocks="")
    sample(patched, steps=6, sampler=sampler, scheduler=scheduler, shape=latent(2, 8, 8))
    dense, sparse = dense_and_sparse_steps(stats.latest())
    assert dense == [0, 1]
    assert sparse == list(range(2, len(sparse) + 2)) and len(sparse) >= 3


@pytest.mark.parametrize("steps", [4, 20])
def test_auto_warmup_is_a_share_of_the_steps(wan, svg2, steps):
    patched, stats = svg2(wan, preset="paper", dense_blocks="")
    sample(patched, steps=steps, shape=latent(2, 8, 8))
    dense, sparse = dense_and_sparse_steps(stats.latest())
    assert dense == list(range(max(1, round(0.2 * steps))))
    assert len(dense) + len(sparse) == steps


def test_no_warmup_if_the_user_says_zero(wan, svg2):
    patched, stats = svg2(wan, warmup_steps=0, dense_blocks="")
    sample(patched)
    assert dense_and_sparse_steps(stats.latest()) == ([], [0, 1, 2, 3])


def noisy(seed=0):
    return torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_a_partial_denoise_of_a_video_has_no_warmup(wan, svg2):
    """Its latent has the layout; so does the upscaled one of a first stage, which gets noise, too."""
    patched, stats = svg2(wan, preset="paper", dense_blocks="")  # a fifth of the steps
    sample(patched, steps=4, denoise=0.5, shape=noisy())
    assert dense_and_sparse_steps(stats.latest()) == ([], [0, 1, 2, 3])


@pytest.mark.parametrize("what", ["empty", "from_the_top"])
def test_a_generation_has_its_warmup(wan, svg2, what):
    """An empty latent has no layout, and a full denoise leaves none of a latent's."""
    patched, stats = svg2(wan, preset="paper", dense_blocks="")
    sample(patched, steps=4, **({"denoise": 0.5, "shape": torch.zeros(1, 16, 5, 16, 16)} if what == "empty" else {"shape": noisy()}))
    assert dense_and_sparse_steps(stats.latest()) == ([0], [1, 2, 3])


def test_a_second_stage_has_no_warmup(wan, svg2):
    """KSamplerAdvanced: the first stage leaves noise in the latent, the second adds none."""
    patched, stats = svg2(wan, warmup_steps=2, dense_blocks="")
    half = sample(patched, steps=8, last_step=4, force_full_denoise=False)
    assert dense_and_sparse_steps(stats.latest()) == ([0, 1], [2, 3])
    sample(patched, steps=8, start_step=4, shape=half, noise=torch.zeros_like(half))
    assert dense_and_sparse_steps(stats.latest()) == ([], [0, 1, 2, 3])


def test_attention_is_dense_again_after_end_percent(wan, svg2):
    patched, stats = svg2(wan, warmup_steps=1, end_percent=0.75, dense_blocks="")
    sample(patched, steps=8)
    dense, sparse = dense_and_sparse_steps(stats.latest())
    assert dense == [0, 6, 7] and sparse == [1, 2, 3, 4, 5]
    assert stats.latest().dense_calls == {"warmup": 3, "past_end": 6}


@pytest.mark.parametrize("sigmas, dense, sparse", [([1.0, 1.0, 0.5, 0.0], [0], [2]), ([1.0, 0.6, 0.3, 0.6, 0.3, 0.0], [0], [1, 2, 3, 4])],
                         ids=["repeated", "restart"])  # fmt: skip
def test_sigmas_of_people_s_own(wan, svg2, sigmas, dense, sparse):
    """SamplerCustom with a first value given twice: a warm-up of one step is the step that changes something."""
    import comfy.sample
    from comfy.samplers import CFGGuider, ksampler
    from tiny_wan import conditioning

    patched, stats = svg2(wan, warmup_steps=1, dense_blocks="")
    guider = CFGGuider(patched)
    guider.set_conds(conditioning(), conditioning(seed=9))
    guider.set_cfg(1.0)
    x = latent()
    with torch.no_grad():
        guider.sample(comfy.sample.prepare_noise(x, 1), x, ksampler("euler"), torch.tensor(sigmas), seed=1, disable_pbar=True)
    assert dense_and_sparse_steps(stats.latest()) == (dense, sparse)
    assert stats.latest().dense_calls == {"warmup": 3 * (2 if sigmas[0] == sigmas[1] else 1)}
