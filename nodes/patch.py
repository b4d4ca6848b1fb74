"""Hang SVG2 on a ModelPatcher: the attention override, the run that holds its state, and the order among patches.

The clone carries only immutable settings. A run's mutable state (centroids, counters) is made by the OUTER_SAMPLE
wrapper, travels in this run's own transformer options and is dropped when sampling ends, however it ends.
"""

import contextlib
import logging
from collections.abc import Callable

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..svg2_core.attention import AttentionResult, default_heads, svg2_attention
from ..svg2_core.cache import Key
from ..svg2_core.config import SVG2Config
from ..svg2_core.layout import Layout
from ..svg2_core.ops import registry
from ..svg2_core.reasons import Reason, Refusal
from ..svg2_core.schedule import Schedule
from ..svg2_core.stopwatch import Stopwatch
from .block_numbers import block_and_total, watch_blocks
from .layouts import calls_wrapper, find_layout, uncompiled
from .model_call import ModelCall
from .run import Run, Settings

KEY = "svg2"  # of the wrappers and callbacks
_RUN = "svg2_run"  # in transformer_options, for the length of a run
_CALL = "svg2_call"  # in transformer_options, for the length of a model evaluation
_OVERRIDE = "optimized_attention_override"
# Dense calls that would have been sparse in another step or block: their time can be compared with the sparse ones'.
COMPARABLE = {Reason.WARMUP, Reason.PAST_END, Reason.DENSE_BLOCK}

log = logging.getLogger("svg2")


def apply_patch(model, settings: Settings):
    """A clone of the ModelPatcher `model` whose video self-attention goes through SVG2. An earlier SVG2 is replaced."""
    model = model.clone()
    wrappers = (
        (WrappersMP.OUTER_SAMPLE, _outer_sample(settings)),
        (WrappersMP.DIFFUSION_MODEL, _diffusion_model),
        (WrappersMP.APPLY_MODEL, _apply_model),
    )
    for kind, wrapper in wrappers:
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    model.remove_callbacks_with_key(CallbacksMP.ON_PREPARE_STATE, KEY)
    model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, KEY, _stay_on_top(settings))
    options = model.model_options.setdefault("transformer_options", {})
    previous = options.get(_OVERRIDE)
    options[_OVERRIDE] = Override(settings, previous.previous if isinstance(previous, Override) else previous)
    return model


def _outer_sample(settings: Settings) -> Callable:
    """The OUTER_SAMPLE wrapper: one run, from its first step to its end or failure."""

    def wrapper(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        continuation = _is_continuation(guider, noise, sigmas)
        run = Run(settings, Schedule(tuple(sigmas.tolist()), settings.config, continuation), batch=noise.shape[0])
        # The guider's options are this run's own copy, so two samplers sharing a model do not see each other's run.
        options = guider.model_options.setdefault("transformer_options", {})
        options[_RUN] = run
        completed = False
        try:
            output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            completed = True
            return output
        finally:
            options.pop(_RUN, None)
            run.finish(completed)

    return wrapper


def _is_continuation(guider, noise: torch.Tensor, sigmas: torch.Tensor) -> bool:
    """Whether this run goes on from another sampler's half-done latent: no noise of its own, and not from the top."""
    top = float(guider.model_patcher.get_model_object("model_sampling").sigma_max)
    return not bool(noise.any()) and float(sigmas[0]) < 0.999 * top


def _diffusion_model(executor, *args, **kwargs):
    """The DIFFUSION_MODEL wrapper: around the network's forward."""
    return _evaluation(executor, executor.class_obj, args, kwargs)


def _apply_model(executor, *args, **kwargs):
    """The APPLY_MODEL wrapper, one level further out: for networks that do not call the one above.

    Around every evaluation it turns a flag that Dynamo guards and that does nothing here. The host's TorchCompileModel
    drops all guards on transformer_options, so what was traced without SVG2 would be run with it, and the other way round.
    """
    network = uncompiled(executor.class_obj.diffusion_model)
    flag = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(not flag)
    try:
        return executor(*args, **kwargs) if calls_wrapper(network) else _evaluation(executor, network, args, kwargs)
    finally:
        torch.set_autocast_cache_enabled(flag)


def _evaluation(executor, network, args, kwargs):
    """Open an evaluation of the network for the calls of the override inside it."""
    values = [*args, *kwargs.values()]
    # Where the options stand among the arguments differs by model, so they are found by what they hold.
    options = next((a for a in values if isinstance(a, dict) and _RUN in a), None)
    if options is None:
        return executor(*args, **kwargs)
    run: Run = options[_RUN]
    call = run.model_call(network, executor.original, args, kwargs, options)
    options[_CALL] = call
    watch = run.stats.model_call(call.step, run.schedule.sigmas[call.step], options["sigmas"].device)
    stop_watching_blocks = None
    try:
        stop_watching_blocks = watch_blocks(call)
        return executor(*args, **kwargs)
    finally:
        if stop_watching_blocks is not None:
            stop_watching_blocks()
        options.pop(_CALL, None)
        with contextlib.suppress(RuntimeError):  # after a device fault; the fault itself is the error to show
            watch.stop()


# Not recursive: the model inside may be compiled; only these frames must not be traced.
_diffusion_model = torch.compiler.disable(_diffusion_model, recursive=False)
_apply_model = torch.compiler.disable(_apply_model, recursive=False)
_evaluation = torch.compiler.disable(_evaluation, recursive=False)


def _stay_on_top(settings: Settings) -> Callable:
    """The ON_PREPARE_STATE callback: a node added later must not silently displace the override."""

    def callback(patcher, timestep, model_options):
        options = model_options.setdefault("transformer_options", {})
        current = options.get(_OVERRIDE)
        if not isinstance(current, Override):
            options[_OVERRIDE] = Override(settings, current)

    return callback


class Override:
    """The attention override. Dense calls go to `previous`, the override that was there before, or to the host."""

    def __init__(self, settings: Settings, previous: Callable | None):
        self.settings = settings
        self.previous = previous

    @torch.compiler.disable
    def __call__(self, func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                 skip_output_reshape=False, **kwargs):  # fmt: skip
        def dense(func=func):
            attention = func if self.previous is None else self.previous
            first = () if self.previous is None else (func,)
            return attention(*first, q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                             skip_output_reshape=skip_output_reshape, **kwargs)  # fmt: skip

        options = kwargs.get("transformer_options") or {}
        run: Run | None = options.get(_RUN)
        call: ModelCall | None = options.get(_CALL)
        if run is None or (call is not None and call.delegating):
            return dense()
        out = not_a_candidate(run, call, kwargs)
        if out is None:
            q_, k_, v_ = (q, k, v) if skip_reshape else (_split_heads(x, heads) for x in (q, k, v))
            out = sparse_or_refusal(run, call, options, q_, k_, v_, mask, kwargs.get("scale"))
        ours = func if mask is not None else run.settings.dense or func  # what computes dense calls over video tokens
        if isinstance(out, Refusal):
            if call is None:
                return dense()
            comparable = out.reason in COMPARABLE
            watch = run.stats.dense_watch(q.device) if comparable else None
            return _delegate(call, dense, ours if comparable else func, watch)
        watch = run.stats.reference_watch(q.device, call.step)
        if watch is not None:
            try:
                _delegate(call, dense, ours, watch)
            except Exception as error:
                if not comfy.model_management.is_oom(error):  # no room for a comparison: the answer is there already
                    raise
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def _delegate(call: ModelCall, dense: Callable, func: Callable, watch: Stopwatch | None) -> torch.Tensor:
    """The dense answer, through the overrides below ours, timed by `watch`."""
    call.delegating = True
    try:
        return dense(func)
    finally:
        call.delegating = False
        if watch is not None:
            watch.stop()


def _split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, N, H * D]` as a `[B, H, N, D]` view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def not_a_candidate(run: Run, call: ModelCall | None, kwargs: dict) -> Refusal | None:
    """What is known not to be for SVG2 before anyone looks at its tensors."""
    if call is None:
        return _refuse(run, Refusal(Reason.UNKNOWN_LAYOUT, "the model does not announce its evaluations"), None)
    if call.refusal is not None:
        return _refuse(run, call.refusal, None)
    if kwargs.get("enable_gqa"):
        return _refuse(run, Refusal(Reason.UNKNOWN_LAYOUT, "fewer key heads than query heads"), None)
    return None


def sparse_or_refusal(run: Run, call: ModelCall, options: dict, q, k, v, mask, scale) -> torch.Tensor | Refusal:
    """Answer a call of q, k, v `[B, H, N, D]` sparsely, or count why not."""
    layout = find_layout(call, q, k, v, mask)
    if isinstance(layout, Refusal):
        return _refuse(run, layout, None)

    number, total = block_and_total(call, options)
    if number is None:
        return _refuse(run, Refusal(Reason.UNKNOWN_LAYOUT, "it cannot be told which block runs"), None)
    nth = call.seen.get(number, 0)
    call.seen[number] = nth + 1
    block = str(number) if nth == 0 else f"{number}.{nth}"

    c_q, c_k = run.settings.config.cluster_counts(layout.video_len)
    reason = call.dense_step or run.schedule.dense_block(number, total)
    if reason is not None:
        return _refuse(run, Refusal(reason), block, call.step)
    least = max(run.settings.config.min_tokens, c_q, c_k)
    if layout.video_len < least:
        return _refuse(run, Refusal(Reason.SHORT_SEQUENCE, f"{layout.video_len:,} < {least:,} tokens"), block, call.step)
    if not (q.dtype == k.dtype == v.dtype):
        return _refuse(run, Refusal(Reason.UNSUPPORTED_DTYPE, f"{q.dtype}, {k.dtype}, {v.dtype}"), block, call.step)

    keys = [
        Key(conditioning, (block, row, layout.video_len, q.device, call.window)) for conditioning, row in call.rows()
    ]
    watch = run.stats.sparse_watch(q.device)
    config = run.schedule.config_of(number, total)
    result = _attend(run, q, k, v, layout, config, keys, scale)
    if isinstance(result, Refusal):
        return _refuse(run, result, block, call.step)
    watch.stop()
    result, backend, cold = result
    for key, entry in zip(keys, result.centroids, strict=False):
        run.cache.put(key, entry)
    run.stats.sparse_call(
        call.step, block, layout.video_len, result.density, backend,
        error=result.error, expected_error=result.expected_error, text_share=result.text_share, cold=cold,
    )  # fmt: skip
    _remark(run, backend)
    if call.step == run.schedule.last_sparse_step:
        run.stats.clusters(block, result.groups, call.grid)
    return result.out


def _refuse(run: Run, refusal: Refusal, block: str | None, step: int | None = None) -> Refusal:
    """Count a dense call; the first of each reason the user should know about goes to the log."""
    if run.stats.dense_call(refusal.reason, block, refusal.detail, step) and not refusal.reason.expected:
        log.warning("SVG2: dense attention: %s", run.stats.notices[refusal.reason])
    return refusal


def _remark(run: Run, backend: str) -> None:
    """Say what runs sparse, but not as the settings ask."""
    config = run.settings.config
    served = config.for_backend(registry.has_far_field(backend))
    if served.compensation != config.compensation or (served.density is None) != (config.density is None):
        what = "centroids stand in" if served.compensation == "centroid" else "nothing stands in"
        sentence = (
            f"backend {backend} has no far field of first order and no choice by density yet: "
            f"pairs are chosen by top_p {served.top_p:g}, and {what} for the others"
        )
        if run.stats.remark("no_far_field", sentence):
            log.warning("SVG2: %s", sentence)
    if backend == "sdpa" and run.stats.device != "cpu":
        sentence = (
            f"backend sdpa reads sizes from the {run.stats.device} device several times in every call, which waits for them; "
            "how fast that is has been measured on CPUs only"
        )
        if run.stats.remark("sdpa_waits", sentence):
            log.warning("SVG2: %s", sentence)
    if run.cache.refused:
        sentence = (
            f"not all clusters fit into the {run.cache.limit_bytes / 2**20:.0f} MiB kept between steps: "
            "the blocks left out start anew at each step, which takes longer"
        )
        if run.stats.remark("cache_full", sentence):
            log.warning("SVG2: %s", sentence)


def _attend(
    run: Run, q, k, v, layout: Layout, config: SVG2Config, keys: list[Key], scale
) -> tuple[AttentionResult, str, bool] | Refusal:
    """Try backends until one answers: -> result, its backend, whether any row started cold. Memory shortage is retried with
    fewer heads at a time."""
    while True:
        warm = [run.cache.get(key) for key in keys] or None
        backend = registry.choose(run.settings.backend, registry.Call(q.device, q.dtype, q.shape[-1]))
        if isinstance(backend, Refusal):
            return backend
        heads = run.heads_at_a_time.get(q.device)
        try:
            result = svg2_attention(q, k, v, layout, config, warm, scale=scale, backend=backend, heads_at_a_time=heads)
            return result, backend, warm is None or any(past is None for past in warm)
        except Exception as error:
            if comfy.model_management.is_oom(error) or "can't allocate memory" in str(error):  # the latter is the CPU's
                if run.cache.drop(q.device):
                    continue
                heads = heads or default_heads(q, layout, config, backend)
                if heads == 1:
                    return Refusal(Reason.OUT_OF_MEMORY, str(error).partition("\n")[0])
                # Another thread may have halved it meanwhile: that it did so is no reason to give up.
                run.heads_at_a_time[q.device] = min(run.heads_at_a_time.get(q.device, heads), heads // 2)
                continue
            # Retired for the life of the process; the next backend, or dense attention, answers this same call.
            log.exception("SVG2: backend %s failed and is retired", backend)
            registry.retire(backend, error)
