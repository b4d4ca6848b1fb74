"""One evaluation of the diffusion model: what its arguments tell of the attention calls to come."""

import inspect
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...svg2_core.reasons import Reason, Refusal


@dataclass
class ModelCall:
    """One evaluation of `network`, as the DIFFUSION_MODEL wrapper sees it. Lives as long as the evaluation.

    inputs: the arguments of the network's forward, by name;
    grid: frames, rows and columns of tokens of the latent alone (references and contexts may add more tokens);
    other_lengths: sequence lengths of its other inputs, which a cross-attention has as its keys;
    refusal: why no call of this evaluation can be sparse;
    conditionings: whose chunks make up the batch, empty if that is not known; window: of a context window;
    options: the evaluation's transformer_options; blocks: by list; block: the one that runs now (block_numbers.py);
    missed: blocks that ran without an attention over the video coming by;
    preferred: what the checkpoint has for the attention module that runs now (preferred_attention.py).
    """

    network: torch.nn.Module
    step: int
    inputs: dict[str, Any]
    batch: int = 0
    frames: int = 0  # of the latent
    grid: tuple[int, int, int] = (0, 0, 0)
    other_lengths: frozenset[int] = frozenset()
    refusal: Refusal | None = None
    conditionings: tuple = ()
    window: tuple | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    options: dict = field(default_factory=dict)
    blocks: dict[str, list] = field(default_factory=dict)
    classes: frozenset[type] = frozenset()  # of the model's own blocks
    numbers: dict[int, int] = field(default_factory=dict)  # of blocks, by id
    block: int | None = None
    missed: list[int] = field(default_factory=list)
    preferred: Callable | None = None
    seen: dict = field(default_factory=dict)  # self-attentions so far, by place
    came: bool = False  # an attention over the video, since the block began
    part_keys: tuple[int, Any] | None = None  # of a block whose parts share the video's keys: its number, and these keys' clusters
    _once: dict = field(default_factory=dict)

    def __deepcopy__(self, memo) -> "ModelCall":
        """Itself: a node that copies the options while sampling is still in the same evaluation."""
        return self

    def is_of(self, options: dict) -> bool:
        """Whether these options carry this evaluation."""
        return any(value is self for value in options.values())

    def enter(self, block: int | None, attends: bool) -> None:
        """A block begins. attends: it is to be noticed if no attention over the video comes by."""
        self.leave()
        self.block, self.came = block, not attends

    def leave(self) -> None:
        """The block that ran has ended."""
        if self.block is not None and not self.came:
            self.missed.append(self.block)
        self.block = None

    @property
    def video_tokens(self) -> int:
        return math.prod(self.grid)

    def grid_of(self, latent: torch.Tensor) -> tuple[int, int, int]:
        """Tokens along the axes of a latent `[B, C, T, H, W]` cut into this network's patches, padded up to whole patches."""
        return tuple(math.ceil(n / p) for n, p in zip(latent.shape[2:], patch_size(self.network), strict=True))

    def tokens_of(self, latent: torch.Tensor) -> int:
        """How many tokens those are."""
        return math.prod(self.grid_of(latent))

    def once(self, key: torch.Tensor, compute: Callable[[], Any]) -> Any:
        """The value computed for this very tensor the first time it is met in this evaluation."""
        known = self._once.get(id(key))
        if known is None or known[0]() is not key:  # gone, and its id given to another: a patch may make masks anew
            known = self._once[id(key)] = weakref.ref(key), compute()
        return known[1]

    def rows(self) -> list[tuple]:
        """For each batch row: its conditioning and its place within the conditioning's chunk. Empty if that is not known."""
        if not self.conditionings:
            return []
        chunk = self.batch // len(self.conditionings)
        return [(self.conditionings[row // chunk], row % chunk) for row in range(self.batch)]


def open_call(step, network, forward, args, kwargs, options: dict, videos: int) -> ModelCall:
    """Read the arguments of an evaluation. videos: how many are sampled together."""
    inputs = by_name(forward, args, kwargs)
    call = ModelCall(network, step, inputs, options=options)
    first = args[0] if args else next(iter(inputs.values()), None)  # another node's wrapper may have passed it by name
    streams = first if isinstance(first, (list, tuple)) else [first]  # video, then sound
    latent = streams[0]
    if isinstance(latent, torch.Tensor):
        call.device = latent.device
    call.refusal = _not_a_video(network, latent)
    if call.refusal is not None:
        return call
    call.batch, call.frames = latent.shape[0], latent.shape[2]
    call.grid = call.grid_of(latent)
    # [B, L, C]; a [B, L, 1] is a timestep per token.
    contexts = {x.shape[1] for x in inputs.values() if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[2] > 1}
    call.other_lengths = frozenset(contexts.union(*(x.shape[2:] for x in streams[1:])))
    # A positive and the negative that the host makes for its region share a uuid: which of the two it is counts as well.
    conditionings = tuple(zip(options.get("uuids") or (), options.get("cond_or_uncond") or (), strict=False))
    # A model-function wrapper may split the host's batch without saying so: then no row is known to be whose.
    call.conditionings = conditionings if len(conditionings) * videos == call.batch else ()
    window = getattr(options.get("context_window"), "index_list", None)
    call.window = None if window is None else tuple(window)
    return call


def by_name(forward: Callable, args, kwargs) -> dict[str, Any]:
    """The arguments of a call of `forward` by their names; those of a `**kwargs` among them."""
    signature = inspect.signature(forward)
    try:
        named = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:  # another node's wrapper changed them: the model will say so itself, or knows more than its signature
        return dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


def _not_a_video(network, latent) -> Refusal | None:
    if not isinstance(latent, torch.Tensor) or latent.dim() != 5:
        return Refusal(Reason.UNKNOWN_LAYOUT, "its latents are not videos")
    if patch_size(network) is None:
        return Refusal(Reason.UNKNOWN_LAYOUT, "its patch size is not known")
    return None


def patch_size(network) -> tuple[int, int, int] | None:
    """Latent frames, rows and columns per token as the network states them, None if it does not."""
    if hasattr(network, "patch_spatial"):  # Cosmos
        return network.patch_temporal, network.patch_spatial, network.patch_spatial
    size = getattr(getattr(network, "patchifier", network), "patch_size", None)  # a patchifier: LTX-Video
    if isinstance(size, int):  # of rows and columns: CogVideoX, Mochi
        return getattr(network, "patch_size_t", None) or 1, size, size
    if isinstance(size, (list, tuple)) and len(size) == 3:
        return tuple(size)
    return None
