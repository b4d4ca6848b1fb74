"""Guidance, conditioning, batches, samplers and stages on Wan, HunyuanVideo, Cosmos 1.0 and Cosmos-Predict2.

With everything selected each equals the dense model's sample; where sparse, it equals the same thing done separately.
"""

import pytest
import tiny_models
import torch
from svg2_pack.svg2_core.metrics import rel_l2
from tiny_wan import random_wan

EVERYWHERE = {"top_p": 1.0, "warmup_steps": 0, "dense_blocks": "", "q_clusters": 8, "k_clusters": 12}
# Few iterations over few tokens: a tie that rounding decides moves a token to another cluster, and then everything.
SPARSE = {**EVERYWHERE, "top_p": 0.3, "kmeans_init_iters": 2, "kmeans_iters": 1}

VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
WAN, HUNYUAN, COSMOS, PREDICT2 = "wan2.1 t2v", "hunyuan_video t2v", "cosmos t2v", "cosmos predict2 v2w"
# Text in the sequence and blocks that the host numbers; text elsewhere and blocks that it does not. The other files cover Wan.
ANNOUNCED_AND_NOT = [HUNYUAN, COSMOS]
PADDED = "hunyuan_video t2v padded"


def small(name):
    """An empty latent of 72 tokens."""
    channels, side = VARIANTS[name].latent().shape[1], 6 if "1.5" in name else 12
    return torch.zeros(1, channels, 2, side, side)


def sample(name, model, **kwargs):
    return tiny_models.sample(VARIANTS[name], model, **{"shape": small(name), "noise_mask": None, **kwargs})


def text(name, tokens: int | None = None, seed: int = 0, **extra):
    """The variant's conditioning, with another length of text (and of its mask) and more inputs."""
    [[embeddings, inputs]] = VARIANTS[name].conditioning(seed)
    if tokens is not None:
        embeddings = embeddings[:, :tokens]
        mask = inputs.get("attention_mask")
        inputs = {**inputs, **({} if mask is None else {"attention_mask": mask[:, :tokens]})}
    return [[embeddings, {**inputs, **extra}]]


def split_always(model, monkeypatch):
    """The host runs conditionings one by one where memory is short."""
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: float("inf"))


def ran_sparse(stats, calls: int) -> bool:
    """Every self-attention was sparse, and there were so many."""
    report = stats.latest()
    return report.sparse_calls == calls and report.dense_calls == {} and report.completed


# Guidance


@pytest.mark.parametrize("name", ANNOUNCED_AND_NOT)
def test_guidance_batched_and_split(model, svg2, monkeypatch, name):
    dense, blocks = sample(name, model(name), cfg=4.0), VARIANTS[name].blocks
    every, every_stats = svg2(model(name), **EVERYWHERE)
    some, some_stats = svg2(model(name), **SPARSE)
    assert rel_l2(sample(name, every, cfg=4.0), dense) <= 1e-4
    batched = sample(name, some, cfg=4.0)
    assert ran_sparse(every_stats, 2 * blocks) and ran_sparse(some_stats, 2 * blocks)
    split_always(model(name), monkeypatch)
    assert rel_l2(sample(name, every, cfg=4.0), dense) <= 1e-4
    # Each conditioning has centroids of its own, however the host arranges them.
    assert rel_l2(sample(name, some, cfg=4.0), batched) <= 1e-3 < 0.05 < rel_l2(batched, dense)
    assert ran_sparse(every_stats, 4 * blocks) and ran_sparse(some_stats, 4 * blocks)


@pytest.mark.parametrize("name", ANNOUNCED_AND_NOT)
def test_a_negative_prompt_of_another_length(model, svg2, name):
    """The host cannot batch it with the positive one."""
    negative = text(name, tokens=5, seed=9)
    dense = sample(name, model(name), cfg=4.0, negative=negative)
    assert rel_l2(dense, sample(name, model(name), cfg=4.0)) > 1e-2, "the negative prompt must matter"
    patched, stats = svg2(model(name), **EVERYWHERE)
    assert rel_l2(sample(name, patched, cfg=4.0, negative=negative), dense) <= 1e-4
    assert ran_sparse(stats, 4 * VARIANTS[name].blocks)


@pytest.mark.parametrize("tokens", [17, 12, None], ids=["padded alike", "padded to another length", "not padded"])
def test_padded_prompts_with_guidance(model, svg2, monkeypatch, tokens):
    """The padding is 9 to 16; the host itself fails on two padded prompts in one batch, so they come one by one."""
    split_always(model(PADDED), monkeypatch)
    negative = text(HUNYUAN, seed=9) if tokens is None else text(PADDED, tokens, seed=9)
    kwargs = {"cfg": 4.0, "negative": negative}
    dense = sample(PADDED, model(PADDED), **kwargs)
    padding = torch.ones(1, 17, dtype=torch.long)
    assert rel_l2(sample(PADDED, model(PADDED), positive=text(PADDED, attention_mask=padding), **kwargs), dense) > 1e-3
    patched, stats = svg2(model(PADDED), **EVERYWHERE)
    assert rel_l2(sample(PADDED, patched, **kwargs), dense) <= 1e-4
    assert ran_sparse(stats, 4 * VARIANTS[PADDED].blocks)


@pytest.mark.parametrize(
    "name, guider",
    [(HUNYUAN, "PerpNegGuider"), (COSMOS, "DualCFGGuider"), (HUNYUAN, "DualModelGuider"), (COSMOS, "DualModelGuider")],
)
def test_guiders_of_three_conditionings_and_of_two_models(model, svg2, name, guider):
    """The host runs DualModelGuider's second model under the first one's options: both are sparse, in one run."""
    import comfy.sample
    import comfy.samplers
    from comfy_extras import nodes_custom_sampler, nodes_perpneg

    positive, negative, third = text(name), text(name, seed=9), text(name, seed=5)

    def guided(main):
        if guider == "PerpNegGuider":
            made = nodes_perpneg.PerpNegGuider.execute(main, positive, negative, third, 4.0, 1.0)
        elif guider == "DualCFGGuider":
            made = nodes_custom_sampler.DualCFGGuider.execute(main, positive, third, negative, 4.0, 2.0, "regular")
        else:
            made = nodes_custom_sampler.DualModelGuider.execute(main, positive, 4.0, other, negative)
        x, euler = small(name), comfy.samplers.sampler_object("euler")
        sigmas = comfy.samplers.calculate_sigmas(main.get_model_object("model_sampling"), "simple", 2)
        return made[0].sample(comfy.sample.prepare_noise(x, 1), x, euler, sigmas, disable_pbar=True, seed=1)

    other = VARIANTS[name].build(seed=1)
    dense = guided(model(name))
    patched, stats = svg2(model(name), **EVERYWHERE)
    assert rel_l2(guided(patched), dense) <= 1e-4
    # Three conditionings are one batch; two models are two calls.
    assert ran_sparse(stats, (4 if guider == "DualModelGuider" else 2) * VARIANTS[name].blocks)


# Conditioning over a part of the picture or of the time


def regional(name, how: str):
    """The prompt everywhere and another one in the middle half of the width."""
    from comfy_extras.nodes_video_model import ConditioningSetAreaPercentageVideo

    import nodes

    other = text(name, seed=5)
    if how == "area":
        [other] = ConditioningSetAreaPercentageVideo().append(other, 0.5, 1.0, 1.0, 0.25, 0.0, 0.0, 1.0)
    else:
        mask = torch.zeros(small(name).shape[-2:])
        mask[:, mask.shape[1] // 4 : -mask.shape[1] // 4] = 1
        [other] = nodes.ConditioningSetMask().append(other, mask, "default", 1.0)
    return text(name) + other


@pytest.mark.parametrize("name, how", [(HUNYUAN, "area"), (COSMOS, "mask")])
def test_regional_conditioning(model, svg2, name, how):
    kwargs = {"positive": regional(name, how), "cfg": 4.0}
    dense = sample(name, model(name), **kwargs)
    plain = sample(name, model(name), **{**kwargs, "positive": text(name)})
    assert rel_l2(plain, dense) > 1e-2, "the region must matter"
    patched, stats = svg2(model(name), **EVERYWHERE)
    assert rel_l2(sample(name, patched, **kwargs), dense) <= 1e-4
    assert stats.latest().dense_calls == {} and stats.latest().sparse_calls > 0


@pytest.mark.parametrize("name", ANNOUNCED_AND_NOT)
def test_a_prompt_that_takes_over_starts_from_the_one_before(model, svg2, name, monkeypatch):
    """ConditioningSetTimestepRange: the second prompt has no past of its own, and takes the first one's."""
    from svg2_pack.svg2_core import session

    import nodes

    first, second = text(name), text(name, seed=5)
    in_range = nodes.ConditioningSetTimestepRange().set_range
    # Steps 0 to 2 of 4 in the first range, step 3 in the second.
    both = in_range(first, 0.0, 0.6)[0] + in_range(second, 0.6, 1.0)[0]
    kwargs = {"steps": 4, "scheduler": "simple"}
    every, every_stats = svg2(model(name), **EVERYWHERE)
    dense = sample(name, model(name), positive=both, **kwargs)
    assert rel_l2(sample(name, every, positive=both, **kwargs), dense) <= 1e-4
    assert ran_sparse(every_stats, 4 * VARIANTS[name].blocks)

    starts, whole = [], session.svg2_attention

    def noted(q, k, v, layout, config, warm, **kwargs):
        result = whole(q, k, v, layout, config, warm, **kwargs)
        starts.append((warm[0], result.centroids[0]))
        return result

    monkeypatch.setattr(session, "svg2_attention", noted)
    some, stats = svg2(model(name), **SPARSE)
    assert rel_l2(sample(name, some, positive=both, **kwargs), dense) > 1e-2
    blocks = VARIANTS[name].blocks
    assert all(start is None for start, _ in starts[:blocks])
    for (start, _), (_, before) in zip(starts[blocks:], starts, strict=False):
        assert start is before, "each block from its own last step, whichever prompt was there"
    assert stats.latest().cold_calls == 0


# Batches, partial denoising, inpainting


@pytest.mark.parametrize("name", [WAN, HUNYUAN])
def test_a_row_of_a_batch_is_the_video_sampled_alone(model, svg2, name, videos=2):
    alone = small(name)
    noise = torch.randn((videos, *alone.shape[1:]), generator=torch.Generator().manual_seed(3))
    patched, stats = svg2(model(name), **SPARSE)
    batch = sample(name, patched, shape=alone.repeat(videos, 1, 1, 1, 1), noise=noise, steps=3, cfg=4.0)
    assert ran_sparse(stats, 3 * VARIANTS[name].blocks), "one call answers the whole batch"
    for row in range(videos):
        one = sample(name, patched, noise=noise[row : row + 1], steps=3, cfg=4.0)
        # The model rounds differently by its batch, which may tip a pair that lies at the edge of its selection; dense differs by 0.3.
        assert rel_l2(batch[row : row + 1], one) <= 0.04
    assert rel_l2(one, sample(name, model(name), noise=noise[-1:], steps=3, cfg=4.0)) > 0.2


def some_video(name):
    return torch.randn(small(name).shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", ANNOUNCED_AND_NOT)
def test_partial_denoise(model, svg2, name):
    kwargs = {"shape": some_video(name), "denoise": 0.5, "steps": 2}
    patched, stats = svg2(model(name), **EVERYWHERE)
    assert rel_l2(sample(name, patched, **kwargs), sample(name, model(name), **kwargs)) <= 1e-4
    assert ran_sparse(stats, 2 * VARIANTS[name].blocks)


@pytest.mark.parametrize("name", [HUNYUAN, PREDICT2])
def test_inpainting(model, svg2, name):
    given = some_video(name)
    mask = torch.zeros(1, 1, *given.shape[2:])
    mask[..., : mask.shape[-1] // 2] = 1  # the left half is made anew
    kwargs = {"shape": given, "noise_mask": mask, "cfg": 4.0}
    dense = sample(name, model(name), **kwargs)
    patched, stats = svg2(model(name), **EVERYWHERE)
    result = sample(name, patched, **kwargs)
    assert rel_l2(result, dense) <= 1e-4
    kept = mask.expand_as(given) == 0
    assert rel_l2(result[kept], given[kept]) <= 1e-4 < 0.1 < rel_l2(result[~kept], given[~kept])
    assert ran_sparse(stats, 2 * VARIANTS[name].blocks)


# Samplers and schedulers


@pytest.mark.parametrize(
    "name, sampler, scheduler, steps",
    [
        (WAN, "uni_pc", "simple", 10),
        (HUNYUAN, "dpmpp_2m", "karras", 6),
        (HUNYUAN, "heun", "beta", 4),
        (COSMOS, "res_multistep", "karras", 10),  # the host's own workflow
        (COSMOS, "lcm", "simple", 4),
        (PREDICT2, "dpmpp_2m", "simple", 6),
    ],
)
def test_samplers(model, svg2, name, sampler, scheduler, steps):
    kwargs = {"sampler": sampler, "scheduler": scheduler, "steps": steps}
    dense = sample(name, model(name), **kwargs)
    patched, stats = svg2(model(name), **EVERYWHERE)
    assert dense.isfinite().all() and rel_l2(sample(name, patched, **kwargs), dense) <= 1e-4
    evaluations = {"heun": 2 * steps - 1}.get(sampler, steps)
    assert ran_sparse(stats, evaluations * VARIANTS[name].blocks)


@pytest.mark.parametrize(
    "name, scheduler, sampler",
    [(COSMOS, "karras", "euler"), (COSMOS, "karras", "uni_pc"), (COSMOS, "simple", "dpmpp_2m"), (PREDICT2, "karras", "res_multistep"),
     (PREDICT2, "karras", "lcm")],
)  # fmt: skip
def test_warmup_and_end_follow_the_noise_levels(model, svg2, name, scheduler, sampler):
    """Cosmos 1.0's noise levels fall from 80 over four orders of magnitude. What ran dense is seen from below SVG2."""
    seen = []

    def dense_attention(func, q, k, v, heads, transformer_options, **kwargs):
        if k.shape[2] == q.shape[2]:
            seen.append((float(transformer_options["sigmas"][0]), transformer_options["sample_sigmas"].tolist()))
        return func(q, k, v, heads, transformer_options=transformer_options, **kwargs)

    below = model(name).clone()
    below.model_options["transformer_options"]["optimized_attention_override"] = dense_attention
    patched, _ = svg2(below, warmup_steps=2, end_percent=0.75, dense_blocks="")
    sample(name, patched, sampler=sampler, scheduler=scheduler, steps=8)
    sigmas = seen[0][1]
    steps = [min(range(9), key=lambda i: abs(sigmas[i] - sigma)) for sigma, _ in seen]
    assert steps == [step for step in (0, 1, 6, 7) for _ in range(VARIANTS[name].blocks)]


# Stages: Wan 2.2's two experts, and one model in two samplers


def two_stages(high, low, steps=4, switch=2):
    """The graph of Wan 2.2: two KSamplerAdvanced, the second going on from the noise that the first one leaves."""
    import nodes

    x = {"samples": small(WAN)}
    text = VARIANTS[WAN].conditioning
    stage = nodes.KSamplerAdvanced().sample
    [x] = stage(high, "enable", 1, steps, 3.0, "euler", "simple", text(), text(9), x, 0, switch, "enable")
    [x] = stage(low, "disable", 0, steps, 3.0, "euler", "simple", text(), text(9), x, switch, 10000, "disable")
    return x["samples"]


@pytest.fixture(scope="module")
def experts(host):
    return random_wan(seed=0), random_wan(seed=1)


@pytest.fixture
def starts(monkeypatch):
    """Every look for past centroids in each run, in order: whether there were any."""
    from svg2_pack.svg2_core.cache import CentroidCache

    runs = {}
    get = CentroidCache.get

    def look(self, key):
        found = get(self, key)
        runs.setdefault(self, []).append(found is not None)
        return found

    monkeypatch.setattr(CentroidCache, "get", look)
    return runs


def test_two_experts(experts, svg2):
    high, low = experts
    dense = two_stages(high, low)
    assert rel_l2(dense, two_stages(high, high)) > 1e-2, "the second expert must matter"
    (patched_high, first), (patched_low, second) = svg2(high, **EVERYWHERE), svg2(low, **EVERYWHERE)
    assert rel_l2(two_stages(patched_high, patched_low), dense) <= 1e-4
    assert ran_sparse(first, 2 * 3) and ran_sparse(second, 2 * 3)
    # An expert of the two may also be left alone.
    assert rel_l2(two_stages(high, patched_low), dense) <= 1e-4


WARMED = {**SPARSE, "warmup_steps": 1}


def test_experts_share_no_state(experts, svg2, starts):
    """Warm-up is for the stage that begins from noise; the other begins with no centroids, and is sparse at once."""
    (high, first), (low, second) = (svg2(m, **WARMED) for m in experts)
    two_stages(high, low)
    assert first.latest().dense_calls == {"warmup": 3} and first.latest().sparse_calls == 3
    assert second.latest().dense_calls == {} and second.latest().sparse_calls == 2 * 3
    cold, warm = [False] * 2 * 3, [True] * 2 * 3  # two rows (conditionings) of three blocks
    assert list(starts.values()) == [cold, cold + warm]


def test_one_model_in_both_stages(experts, svg2, starts):
    patched, stats = svg2(experts[0], **WARMED)
    two_stages(patched, patched)
    first, second = stats.reports()
    assert first.dense_calls == {"warmup": 3} and second.dense_calls == {}
    cold, warm = [False] * 2 * 3, [True] * 2 * 3
    assert list(starts.values()) == [cold, cold + warm]


def test_two_samplers_with_other_settings_do_not_meet(model, svg2):
    """One patched model in two samplers of a graph, and a second SVG2 with other settings in a third."""
    one, first = svg2(model(COSMOS), **SPARSE)
    other, second = svg2(model(COSMOS), **{**SPARSE, "q_clusters": 5, "k_clusters": 9, "warmup_steps": 1})
    euler, unipc = {"steps": 3, "cfg": 4.0}, {"steps": 4, "sampler": "uni_pc", "scheduler": "karras", "seed": 5}
    alone = sample(COSMOS, one, **euler), sample(COSMOS, one, **unipc), sample(COSMOS, other, **unipc)
    again = sample(COSMOS, other, **unipc), sample(COSMOS, one, **unipc), sample(COSMOS, one, **euler)
    assert all(torch.equal(a, b) for a, b in zip(alone, again[::-1], strict=True))
    assert [r.sparse_calls for r in first.reports()] == [9, 12, 12, 9]
    assert [(r.sparse_calls, r.dense_calls) for r in second.reports()] == [(9, {"warmup": 3})] * 2
