"""One evaluation of the network: opened by the wrappers that SVG2 hangs on the model, for the attention calls inside it.

Which wrapper opens it depends on the network: most call DIFFUSION_MODEL wrappers around their forward, some call none.
"""

import contextlib

import torch

from .block_numbers import watch_blocks
from .layouts import calls_wrapper, uncompiled
from .now import set_current
from .option_keys import CALL, RUN
from .other_overrides import put_on_top
from .preferred_attention import watch_preferred
from .run import Run


def diffusion_model(executor, *args, **kwargs):
    """The DIFFUSION_MODEL wrapper: around the network's forward."""
    return _evaluation(executor, executor.class_obj, args, kwargs)


def apply_model(executor, *args, **kwargs):
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
    options = next((a for a in values if isinstance(a, dict) and RUN in a), None)
    if options is None:
        return executor(*args, **kwargs)
    run: Run = options[RUN]
    call = run.model_call(network, executor.original, args, kwargs, options)
    options[CALL] = call
    put_on_top(run, run.place, options)
    before = set_current(call)
    watch = run.stats.model_call(call.step, run.schedule.sigmas[call.step], call.device)
    stop_watching = []
    try:
        stop_watching.append(watch_blocks(call))
        stop_watching.append(watch_preferred(run.asking))
        out = executor(*args, **kwargs)
        run.missed(call)
        return out
    finally:
        for stop in stop_watching:
            stop()
        set_current(before)
        options.pop(CALL, None)
        with contextlib.suppress(RuntimeError):  # after a device fault; the fault itself is the error to show
            watch.stop()


# Not recursive: the model inside may be compiled; only these frames must not be traced.
diffusion_model = torch.compiler.disable(diffusion_model, recursive=False)
apply_model = torch.compiler.disable(apply_model, recursive=False)
_evaluation = torch.compiler.disable(_evaluation, recursive=False)
