"""Where in the host's models a norm and what follows it can be computed together, and how to get between the two.

The host's own methods are run, not copies of them: with stand-ins for some of the norms on `self` and for some of the
functions they call. That is right only for the source it was written for, so a site is known by the hash of its method
and of the functions it relies on. With any other source the model runs as it is, and the report says so.
"""

import hashlib
import importlib
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...svg2_core.ops.norm_rope.measured import MODULATION, ROTARY
from .norms import Deferred, Deferring, Direct, Fused, PutOff, fits

Method = Callable


@dataclass(frozen=True)
class Site:
    """A method of a class of the host that is run with stand-ins.

    method: its full name; norms: names of the norms below the module that are taken over; relies_on: functions that,
    too, decide whether this is right; digest: of the sources that were looked at, ComfyUI 0.30's.
    inherits: the site is for a subclass whose own method of that name does nothing but call this one.
    only_if: an attribute of the module that has to be true.
    make: (fused, the host's method) -> the method to use.
    """

    kinds: tuple[str, ...]
    method: str
    norms: tuple[str, ...]
    relies_on: tuple[str, ...]
    digest: str
    make: Callable[[Fused, Method], Method]
    inherits: str | None = None
    only_if: str | None = None

    @property
    def owner(self) -> str:
        return self.method.rpartition(".")[0]

    @property
    def recognised(self) -> bool:
        inherits = () if self.inherits is None else (f"{self.inherits}.{self.method.rpartition('.')[2]}",)
        return digest(self.method, *self.relies_on, *inherits) == self.digest


def digest(*names: str) -> str | None:
    """Of the sources of functions of the host, as they are now; None where one is missing or has no source."""
    try:
        return _digest(*(find(name) for name in names))
    except (ImportError, AttributeError, OSError, TypeError):
        return None


@lru_cache(None)
def _digest(*functions: Callable) -> str:
    text = "\n".join(inspect.getsource(function) for function in functions)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find(name: str):
    """A module's class or function by its full name."""
    path = name.split(".")
    for cut in range(len(path) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(path[:cut]))
        except ModuleNotFoundError:
            continue
        for part in path[cut:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def calls(method: str, kernel: str) -> bool:
    """Whether a method of the host, as it is now, calls a kernel of comfy_kitchen: itself, or by a function of its module."""
    try:
        function = find(method)
        named = _names(function.__code__)
        helpers = [function.__globals__.get(name) for name in named]
    except (ImportError, AttributeError):
        return False
    return kernel in named or any(kernel in _names(f.__code__) for f in helpers if isinstance(f, types.FunctionType))


def _names(code: types.CodeType) -> set[str]:
    """What a function, and those within it, looks up by name."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


class StandIn:
    """A module with some of its children replaced, for the length of a call."""

    def __init__(self, module: torch.nn.Module, **children):
        self.__dict__.update(children)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str):
        return getattr(self._module, name)


class _Globals(dict):
    """A function's globals with some names replaced; all others are looked up where they were, as they are then."""

    def __init__(self, outer: dict, names: dict):
        super().__init__(names)
        self.outer = outer

    def __missing__(self, name: str):
        return self.outer[name]


def with_globals(function: types.FunctionType, **names) -> types.FunctionType:
    """The same code, to which these global names mean something else."""
    new = types.FunctionType(function.__code__, _Globals(function.__globals__, names), function.__name__,
                             function.__defaults__, function.__closure__)  # fmt: skip
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def unless_compiling(own: Method, fused: Method) -> Method:
    """In a compiled graph the compiler fuses these operations itself, and could not look into the kernels."""

    def method(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return own(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    return method


def modulated(*norms: str) -> Callable[[Fused, Method], Method]:
    """Norms whose result goes into torch.addcmul, or is multiplied and then added to, at once."""

    def make(fused, own):
        def run(self, *args, **kwargs):
            return own(StandIn(self, **{n: Deferring(fused, getattr(self, n)) for n in norms}), *args, **kwargs)

        return unless_compiling(own, run)

    return make


def _rotating(own):
    """`own`, in which apply_rope1 takes queries or keys whose norm was put off."""
    apply_rope1 = own.__globals__["apply_rope1"]

    def rotate(x, freqs):
        if isinstance(x, Deferred):
            return x.rotated(freqs, "interleaved", apply_rope1, heads_first=False)
        return apply_rope1(x, freqs)

    return with_globals(own, apply_rope1=rotate)


# Wan


def wan_attention(fused, own):
    """Norms over all heads, then rotary embedding of each."""
    rebound = _rotating(own)

    def run(self, *args, **kwargs):
        norms = {name: Deferring(fused, getattr(self, name)) for name in ("norm_q", "norm_k")}
        return rebound(StandIn(self, **norms), *args, **kwargs)

    return unless_compiling(own, run)


# HunyuanVideo, whose blocks are Flux's


class _QKNorm:
    """In the place of a block's QKNorm."""

    def __init__(self, put_off: type, fused: Fused, module: torch.nn.Module):
        self.query, self.key = put_off(fused, module.query_norm), put_off(fused, module.key_norm)
        self.module = module

    def __call__(self, q, k, v):
        return (self.query(q), self.key(k)) if q.dtype == k.dtype == v.dtype else self.module(q, k, v)


def _flux_functions(own):
    """apply_mod and attention as the blocks call them, for tensors that are put off."""
    host_mod, host_attention = own.__globals__["apply_mod"], own.__globals__["attention"]
    apply_rope1 = find("comfy.ldm.flux.math.apply_rope1")

    def apply_mod(tensor, m_mult, m_add=None, modulation_dims=None):
        if isinstance(tensor, Deferred):
            if m_add is not None and modulation_dims is None:
                return tensor.modulated(m_mult, m_add, lambda shift, x, factor: host_mod(x, factor, shift))
            tensor = tensor.tensor()
        return host_mod(tensor, m_mult, m_add, modulation_dims)

    def rotate(x, pe):
        if not isinstance(x, PutOff):
            return x if pe is None else apply_rope1(x, pe)
        return x.tensor() if pe is None else x.rotated(pe, "interleaved", apply_rope1, heads_first=True)

    def attention(q, k, v, pe, **kwargs):
        if isinstance(q, PutOff) or isinstance(k, PutOff):
            q, k, pe = rotate(q, pe), rotate(k, pe), None
        return host_attention(q, k, v, pe=pe, **kwargs)

    return {"apply_mod": apply_mod, "attention": attention}


def _of_queries(kwargs) -> type:
    """Another node's patch between norm and rotary embedding looks at tensors."""
    patched = "attn1_patch" in (kwargs.get("transformer_options") or {}).get("patches", {})
    return Direct if patched else Deferring


def flux_double_block(fused, own):
    rebound = with_globals(own, **_flux_functions(own))

    def run(self, *args, **kwargs):
        children = {n: Deferring(fused, getattr(self, n)) for n in ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")}
        for name in ("img_attn", "txt_attn"):
            attention = getattr(self, name)
            children[name] = StandIn(attention, norm=_QKNorm(_of_queries(kwargs), fused, attention.norm))
        return rebound(StandIn(self, **children), *args, **kwargs)

    return unless_compiling(own, run)


def flux_single_block(fused, own):
    rebound = with_globals(own, **_flux_functions(own))

    def run(self, *args, **kwargs):
        children = {"pre_norm": Deferring(fused, self.pre_norm), "norm": _QKNorm(_of_queries(kwargs), fused, self.norm)}
        return rebound(StandIn(self, **children), *args, **kwargs)

    return unless_compiling(own, run)


# Cosmos 1.0


def modulated_by(name):
    """Of a block that hands its norms to the function `name(norm, x, scale, shift)` of its module, which does the rest."""

    def block(fused, own):
        host = own.__globals__[name]

        def modulate(norm, x, scale, shift):
            return host(Deferring(fused, norm), x, scale, shift)

        return unless_compiling(own, with_globals(own, **{name: modulate}))

    return block


cosmos_block = modulated_by("adaln_norm_state")


def cosmos_qkv(fused, own):
    """Self-attention's projections: per head a norm, then the rotary embedding that the host writes out in place."""

    def run(self, x, context=None, mask=None, rope_emb=None, **kwargs):
        if rope_emb is not None and context is None:
            table, result = rope_emb[None, None], []
            for linear, norm in (self.to_q, self.to_k):
                y = heads_of(linear(x), self.heads)
                result.append(fused.rotary(norm, y, table, "halves") if fits(table, y, norm) else None)
                if result[-1] is None:
                    return own(self, x, context, mask, rope_emb=rope_emb, **kwargs)
            linear, norm = self.to_v
            return *result, norm(heads_of(linear(x), self.heads))
        return own(self, x, context, mask, rope_emb=rope_emb, **kwargs)

    return unless_compiling(own, run)


def heads_of(x: torch.Tensor, heads: int) -> torch.Tensor:
    """A projection `[N, B, H * D]` as `[B, H, N, D]`."""
    return x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


# LTX-Video


def ltx_attention(fused, own):
    """Norms over all heads, then a rotary embedding that is each head's own; cross-attention has only the norms."""
    one, both = own.__globals__["apply_rotary_emb"], own.__globals__["apply_rotary_emb_qk"]

    def rotate(x, pe):
        if not isinstance(x, Deferred):
            return one(x, pe)
        table, halves = pe
        b, n, width = x.shape
        heads = table.shape[2]

        def host(y, _):
            return one(y.flatten(2), pe).view(y.shape)

        pairs = "halves" if halves else "interleaved"
        return x.view(b, n, heads, width // heads).rotated(table, pairs, host, heads_first=False).flatten(2)

    def rotate_both(q, k, pe):
        if isinstance(q, Deferred) or isinstance(k, Deferred):
            return rotate(q, pe), rotate(k, pe)
        return both(q, k, pe)

    rebound = with_globals(own, apply_rotary_emb=rotate, apply_rotary_emb_qk=rotate_both)

    def run(self, x, context=None, mask=None, pe=None, **kwargs):
        norm = Direct if pe is None else Deferring
        return rebound(
            StandIn(self, q_norm=norm(fused, self.q_norm), k_norm=norm(fused, self.k_norm)),
            x,
            context,
            mask,
            pe,
            **kwargs,
        )

    return unless_compiling(own, run)


# Kandinsky 5


def kandinsky_qk(fused, own):
    rebound = _rotating(own)

    def run(self, x, freqs, proj_fn, norm_fn):
        return rebound(self, x, freqs, proj_fn, Deferring(fused, norm_fn))

    return unless_compiling(own, run)


kandinsky_block = modulated_by("apply_scale_shift_norm")


WAN, FLUX, COSMOS, KANDINSKY = (f"comfy.ldm.{name}" for name in ("wan.model", "flux", "cosmos", "kandinsky5.model"))
ROPE = f"{FLUX}.math.apply_rope1"
WAN_BLOCK = {
    "kinds": (MODULATION,),
    "norms": ("norm1", "norm2"),
    "relies_on": (f"{WAN}.repeat_e",),
    "make": modulated("norm1", "norm2"),
}
FLUX_BLOCK = {
    "kinds": (MODULATION, ROTARY),
    "relies_on": (f"{FLUX}.layers.apply_mod", f"{FLUX}.layers.QKNorm.forward", f"{FLUX}.math.attention", ROPE),
}
KANDINSKY_BLOCK = {
    "kinds": (MODULATION,),
    "relies_on": (f"{KANDINSKY}.apply_scale_shift_norm",),
    "make": kandinsky_block,
}
QK = ("norm_q", "norm_k")
PREDICT2_NORMS = ("layer_norm_self_attn", "layer_norm_cross_attn", "layer_norm_mlp")

SITES = (
    Site((ROTARY,), f"{WAN}.WanSelfAttention.forward", QK, (ROPE,), "36b10faacce70565", wan_attention),
    Site(method=f"{WAN}.WanAttentionBlock.forward", digest="638e6f5c2247ee19", **WAN_BLOCK),
    Site(
        method=f"{WAN}.WanAttentionBlock.forward",
        digest="2587722b3b6d77c3",
        inherits=f"{WAN}.VaceWanAttentionBlock",
        **WAN_BLOCK,
    ),
    Site(method=f"{WAN}.WanAttentionBlockAudio.forward", digest="ef51152b2e17db5d", **WAN_BLOCK),
    Site(
        method=f"{FLUX}.layers.DoubleStreamBlock.forward",
        digest="46d3d5003d3586a9",
        make=flux_double_block,
        **FLUX_BLOCK,
        norms=(
            "img_norm1",
            "img_norm2",
            "txt_norm1",
            "txt_norm2",
            *(f"{s}_attn.norm.{x}_norm" for s in ("img", "txt") for x in ("query", "key")),
        ),
    ),
    Site(
        method=f"{FLUX}.layers.SingleStreamBlock.forward",
        digest="af886ec93b21d3ac",
        make=flux_single_block,
        **FLUX_BLOCK,
        norms=("pre_norm", "norm.query_norm", "norm.key_norm"),
    ),
    Site(
        (MODULATION,),
        f"{COSMOS}.blocks.DITBuildingBlock.forward",
        ("norm_state",),
        (f"{COSMOS}.blocks.adaln_norm_state",),
        "e5c71b779c82dcbb",
        cosmos_block,
    ),
    Site(
        (ROTARY,),
        f"{COSMOS}.blocks.Attention.cal_qkv",
        ("to_q.1", "to_k.1"),
        (),
        "d8cd460f04c5e57f",
        cosmos_qkv,
        only_if="is_selfattn",
    ),
    Site(
        (MODULATION,),
        f"{COSMOS}.predict2.Block.forward",
        PREDICT2_NORMS,
        (),
        "a65b1110445ffed6",
        modulated(*PREDICT2_NORMS),
    ),
    Site(
        (ROTARY,),
        "comfy.ldm.lightricks.model.CrossAttention.forward",
        ("q_norm", "k_norm"),
        ("comfy.ldm.lightricks.model.apply_rotary_emb", "comfy.ldm.lightricks.model.apply_rotary_emb_qk"),
        "dd37337bf525500b",
        ltx_attention,
    ),
    Site(
        (ROTARY,),
        f"{KANDINSKY}.SelfAttention._compute_qk",
        ("query_norm", "key_norm"),
        (ROPE,),
        "83f911aa624e55dd",
        kandinsky_qk,
    ),
    Site(
        method=f"{KANDINSKY}.TransformerEncoderBlock.forward",
        digest="89edb4d401465eab",
        **KANDINSKY_BLOCK,
        norms=("self_attention_norm", "feed_forward_norm"),
    ),
    Site(
        method=f"{KANDINSKY}.TransformerDecoderBlock.forward",
        digest="2328c920d6e854dc",
        **KANDINSKY_BLOCK,
        norms=("self_attention_norm", "cross_attention_norm", "feed_forward_norm"),
    ),
    Site(
        (MODULATION,),
        "comfy.ldm.cogvideo.model.CogVideoXLayerNormZero.forward",
        ("norm",),
        (),
        "3911a0b238c27b7a",
        modulated("norm"),
    ),
)

# What comfy_kitchen has for a modulation. Newer hosts call it, in sources that this was not written for.
HOSTS_MODULATION = "adaln"
# Modules whose queries and keys ComfyUI 0.30 itself normalises and rotates in one kernel: by which method, and which kernel.
HOSTS_OWN = {
    f"{COSMOS}.predict2.Attention": ("compute_qkv", "rms_rope_split_half"),
    "comfy.ldm.minimax.model.Attention": ("forward", "rms_rope_split_half_"),
}
