"""Hang SVG2 on a ModelPatcher: the attention override, the run that holds its state, and the order among patches.

The clone carries only immutable settings. A run's mutable state (centroids, counters) is made by the OUTER_SAMPLE
wrapper, travels in this run's own transformer options and is dropped when sampling ends, however it ends.
"""

from collections.abc import Callable

import torch
from comfy.patcher_extension import WrappersMP

from ...svg2_core.schedule import Schedule
from .block_numbers import block_lists
from .evaluation import apply_model, diffusion_model
from .layouts import trained_sparse
from .option_keys import OVERRIDE, RUN
from .other_overrides import take_place
from .override import Override
from .preferred_attention import asking_modules
from .run import Run, Settings

KEY = "svg2"  # of the wrappers

TRAINED_SPARSE = (
    "this checkpoint was trained for a sparse attention of its own (VSA). SVG2 stands in for dense attention, which it was not "
    "trained for: expect a worse video. ComfyUI's Model Sparse Attention, method vsa, computes what it was trained for"
)


def apply_patch(model, settings: Settings):
    """A clone of the ModelPatcher `model` whose video self-attention goes through SVG2. An earlier SVG2 is replaced."""
    model = remove_patch(model)
    options = model.model_options["transformer_options"]
    previous = options.get(OVERRIDE)
    options[OVERRIDE] = Override(settings, previous, previous)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample(settings, previous))
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, diffusion_model)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model)
    return model


def remove_patch(model):
    """A clone of the ModelPatcher `model` without SVG2; the override that was there before it is back."""
    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    current = options.get(OVERRIDE)
    if isinstance(current, Override):
        options.pop(OVERRIDE)
        if current.previous is not None:
            options[OVERRIDE] = current.previous
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL):
        model.remove_wrappers_with_key(kind, KEY)
    return model


def _outer_sample(settings: Settings, previous: Callable | None) -> Callable:
    """The OUTER_SAMPLE wrapper: one run, from its first step to its end or failure. previous: the override before ours."""

    def wrapper(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        schedule = Schedule(tuple(sigmas.tolist()), settings.config, _has_its_layout(guider, latent_image, sigmas))
        # Now: later, during an evaluation, another node may have put something else in place of the blocks.
        network = guider.model_patcher.get_model_object("diffusion_model")
        run = Run(settings, schedule, noise.shape[0], block_lists(network), asking_modules(network))
        if trained_sparse(network):
            run.remark("trained_sparse", TRAINED_SPARSE)
        # The guider's options are this run's own copy, so two samplers sharing a model do not see each other's run.
        options = guider.model_options.setdefault("transformer_options", {})
        options[RUN], ours = run, options.get(OVERRIDE)
        run.place = take_place(previous, guider.model_patcher, options)
        completed = False
        try:
            output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            completed = True
            return output
        finally:
            options.pop(RUN, None)
            options[OVERRIDE] = ours
            run.finish(completed)

    return wrapper


def _has_its_layout(guider, latent: torch.Tensor, sigmas: torch.Tensor) -> bool:
    """Whether a run begins where a warm-up would have ended: below the noise that the model starts from, on a latent with something
    in it. So begin the second of two experts, a stage that refines an upscaled latent, and a partial denoise of a video; told
    apart from a generation by these two facts, for whether noise is added differs among them."""
    top = float(guider.model_patcher.get_model_object("model_sampling").sigma_max)
    return len(sigmas) > 0 and float(sigmas[0]) < 0.999 * top and bool(latent.any())
