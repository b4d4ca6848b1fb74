"""Number the transformer blocks: as the host announces them, or by watching which one runs.

Counting attention calls would do only until another node skips a block: all later blocks would take each other's
centroids. So where the host gives no index, each block of the network notes that it runs, for the length of an evaluation.
"""

import threading
from collections.abc import Callable

import torch

from .layouts import family_of
from .model_call import ModelCall

_now = threading.local()  # call: the evaluation on this thread; the host runs one thread per GPU


def find_blocks(network: torch.nn.Module) -> dict[str, list[torch.nn.Module]]:
    """The network's lists of transformer blocks by name, in the order they run."""
    lists = {
        name: list(child.values() if isinstance(child, torch.nn.ModuleDict) else child)
        for name, child in network.named_children()
        if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict))
    }
    names = family_of(network).blocks or sorted(lists, key=lambda name: len(lists[name]))[-1:]
    return {name: lists[name] for name in names if name in lists}


def block_and_total(call: ModelCall, options: dict) -> tuple[int | None, int | None]:
    """Number of the block that runs now, counted over the whole network, and how many there are; None if not known."""
    lists = find_blocks(call.network)
    total = sum(map(len, lists.values())) or None
    index = options.get("block_index")
    if index is None:
        return call.block, total
    # HunyuanVideo's numbers begin anew with its single blocks.
    before = 0
    for name, blocks in lists.items():
        if name == f"{options.get('block_type')}_blocks":
            return before + index, total
        before += len(blocks)
    return index, total


@torch.compiler.disable
def watch_blocks(call: ModelCall) -> Callable[[], None]:
    """Keep `call.block` at the block that runs, if the host does not announce it; until the result is called."""
    if call.refusal is not None or family_of(call.network).numbered:
        return _nothing
    blocks = [block for blocks in find_blocks(call.network).values() for block in blocks]
    outer = getattr(_now, "call", None), getattr(_now, "numbers", None)
    _now.call, _now.numbers = call, {id(block): number for number, block in enumerate(blocks)}
    handles = [block.register_forward_pre_hook(_enter) for block in blocks]

    @torch.compiler.disable
    def stop() -> None:
        for handle in handles:
            handle.remove()
        _now.call, _now.numbers = outer

    return stop


def _nothing() -> None:
    pass


# One function for all, that finds the evaluation itself: a compiled network keeps the hooks it was traced with.
@torch.compiler.disable
def _enter(block, args) -> None:
    if getattr(_now, "call", None) is not None:
        _now.call.block = _now.numbers.get(id(block))
