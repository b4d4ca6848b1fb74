"""Attention that a checkpoint asks for: newer hosts keep it in a module inside the network and hand it to their attention function,
which drops it where there is an override. Our dense calls look it up in the module that runs."""

from collections.abc import Callable

import torch

from .now import current


def asking_modules(network: torch.nn.Module) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Each module that attends as its checkpoint asks, with the host's ComfyAttention inside it."""
    return [
        (module, child)
        for module in network.modules()
        for child in module.children()
        if type(child).__name__ == "ComfyAttention" and getattr(child, "function", None) is not None
    ]


@torch.compiler.disable
def watch_preferred(modules: list[tuple[torch.nn.Module, torch.nn.Module]]) -> Callable[[], None]:
    """Keep the open evaluation's `preferred` at what the running module asks for, until the result is called."""
    asked = {id(module): child for module, child in modules}

    @torch.compiler.disable
    def enter(module, args):
        if (call := current()) is not None:
            call.preferred = asked[id(module)].function

    @torch.compiler.disable
    def leave(module, args, out):
        if (call := current()) is not None:
            call.preferred = None

    handles = [module.register_forward_pre_hook(enter) for module, _ in modules]
    handles += [module.register_forward_hook(leave, always_call=True) for module, _ in modules]

    @torch.compiler.disable
    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop
