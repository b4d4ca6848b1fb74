"""Number the transformer blocks by watching which one runs.

The host's own numbers do not suffice: some models announce none, and a node that runs the blocks itself (a step cache) may
announce none or always the same. So each block notes that it runs, for the length of an evaluation. Where nothing was seen to
run, the host's number is taken.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from .layouts import family_of, uncompiled
from .model_call import ModelCall
from .now import current

Blocks = dict[str, list[torch.nn.Module]]


@dataclass(frozen=True)
class BlockLists:
    """Where a network keeps its transformer blocks, of which classes they are, and how many."""

    names: tuple[str, ...]
    classes: frozenset[type]
    total: int


def block_lists(network: torch.nn.Module) -> BlockLists:
    """Read off a network as its model made it: its family's lists of modules, or the longest one it has."""
    network = uncompiled(network)
    lists = {name: _members(child) for name, child in network.named_children() if _is_list(child)}
    names = family_of(network).blocks or sorted(lists, key=lambda name: len(lists[name]))[-1:]
    names = tuple(name for name in names if name in lists)
    blocks = [uncompiled(block) for name in names for block in lists[name]]
    # Another node's module may be in place of one already: not so the host's own.
    own = {type(block) for block in blocks if type(block).__module__.startswith("comfy.")} or set(map(type, blocks))
    return BlockLists(names, frozenset(own), len(blocks))


def find_blocks(network: torch.nn.Module, known: BlockLists) -> Blocks:
    """The transformer blocks by list, in the order they run: also those inside a module that stands in their place. What has none
    inside counts as one, where it stands in the place of one. Empty lists: what stands there cannot be told."""
    network = uncompiled(network)
    lists = {name: _members(getattr(network, name)) for name in known.names if _is_list(getattr(network, name, None))}
    inside = {name: [list(_outermost(member, known.classes)) for member in members] for name, members in lists.items()}
    found = sum(len(blocks) for of_list in inside.values() for blocks in of_list)
    if found == 0 and sum(map(len, lists.values())) != known.total:
        return {name: [] for name in lists}
    whole = found == known.total
    return {
        name: [block for member, blocks in zip(lists[name], inside[name], strict=True) for block in blocks or ([] if whole else [member])]
        for name in lists
    }


def _is_list(module) -> bool:
    return isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))


def _members(modules) -> list[torch.nn.Module]:
    return list(modules.values() if isinstance(modules, torch.nn.ModuleDict) else modules)


def _outermost(module: torch.nn.Module, classes: frozenset[type]) -> Iterator[torch.nn.Module]:
    """The module itself if it is a block, else the blocks inside it."""
    if type(uncompiled(module)) in classes:
        yield module
        return
    for child in module.children():
        yield from _outermost(child, classes)


def block_and_total(call: ModelCall, options: dict) -> tuple[int | None, int | None]:
    """Number of the block that runs now, counted over the whole network, and how many there are; None if not known."""
    total = sum(map(len, call.blocks.values())) or None
    index = options.get("block_index")
    replaced = call.blocks and total is None  # something stands in place of them: the host's number is of that
    if call.block is not None or index is None or replaced:
        return call.block, total
    # HunyuanVideo's numbers begin anew with its single blocks.
    before = 0
    for name, blocks in call.blocks.items():
        if name == f"{options.get('block_type')}_blocks":
            return before + index, total
        before += len(blocks)
    return index, total


@torch.compiler.disable
def watch_blocks(call: ModelCall) -> Callable[[], None]:
    """Keep `call` at the block that runs, until the result is called. A block that was not given the evaluation's options
    (step caches leave them out) is given them: without, its attention would not come to SVG2."""
    if call.refusal is not None:
        return _nothing
    blocks = [block for blocks in call.blocks.values() for block in blocks]
    call.numbers = {id(block): number for number, block in enumerate(blocks)}
    handles = [block.register_forward_pre_hook(_enter, with_kwargs=True) for block in blocks]

    @torch.compiler.disable
    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


def _nothing() -> None:
    pass


# One function for all, that finds the evaluation itself: a compiled network keeps the hooks it was traced with.
@torch.compiler.disable
def _enter(block, args, kwargs):
    call = current()
    if call is None or call.refusal is not None:
        return None
    own = type(uncompiled(block))
    place = _options_at(own)
    given = kwargs.get(_OPTIONS, args[place] if place is not None and place < len(args) else None)
    # Another node's module may skip what it stands for.
    call.enter(call.numbers.get(id(block)), attends=own in call.classes and not _leaves_out_video(given or {}))
    if place is None or given is call.options or (given and call.is_of(given)):
        return None
    if place < len(args):
        return (*args[:place], {**(given or {}), **call.options}, *args[place + 1 :]), kwargs
    return args, {**kwargs, _OPTIONS: {**(given or {}), **call.options}}


_OPTIONS = "transformer_options"


def _leaves_out_video(options: dict) -> bool:
    """Whether LTX's blocks are told to leave their self-attention out, for guidance by what comes of it (STG), or the video."""
    return bool(options.get("stg_skip_self_attn")) or not options.get("run_vx", True)


@lru_cache
def _options_at(block: type) -> int | None:
    """Place of the options among the arguments of a block's forward; None if it takes none."""
    names = list(inspect.signature(block.forward).parameters)[1:]
    return names.index(_OPTIONS) if _OPTIONS in names else None
