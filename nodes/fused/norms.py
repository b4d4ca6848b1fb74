"""A model's norms computed by svg2_core's kernels, alone or together with what follows them.

A norm that is followed by a modulation or a rotary embedding is put off (`Deferred`) until that is known, and both are
computed in one pass. What the kernels do not serve is computed as the model would have.
"""

import contextlib
from collections import Counter

import comfy.ops
import torch
from torch.utils._pytree import tree_map

from ...svg2_core.ops.norm_rope import layer_norm, measured, rms_norm, rms_norm_rotary, support

EPS_OF_NONE = torch.finfo(torch.float32).eps  # what torch takes for half precision, too


class Fused:
    """What one node decided, and how often each kind has run. backend: as asked for, see `support.BACKENDS`."""

    def __init__(self, backend: str):
        self.backend = backend
        self.calls: Counter[str] = Counter()

    def backend_for(self, norm: torch.nn.Module, x: torch.Tensor) -> str | None:
        """None where this call is the model's own: nothing here has a gradient."""
        needs_gradient = x.requires_grad or (norm.weight is not None and norm.weight.requires_grad)
        if needs_gradient and torch.is_grad_enabled():
            return None
        return support.choose(self.backend, x.device, x.dtype)[0]

    def norm(self, norm: torch.nn.Module, x: torch.Tensor, factor=None, shift=None) -> torch.Tensor | None:
        """norm(x) * factor + shift; None where the kernels do not serve it."""
        terms = [term for term in (factor, shift) if term is not None]
        if any(torch.promote_types(x.dtype, term.dtype) != x.dtype for term in terms):
            return None  # rounded to x's dtype in between
        kind = measured.MODULATION if terms else measured.NORM

        def compute(weight, bias, backend):
            settings = {"eps": eps_of(norm), "factor": factor, "shift": shift, "backend": backend}
            if isinstance(norm, torch.nn.LayerNorm):
                return layer_norm(x, weight, bias, **settings)
            return rms_norm(x, weight, **settings)

        return self._run(norm, x, kind, compute)

    def rotary(self, norm: torch.nn.RMSNorm, x: torch.Tensor, rotation: torch.Tensor, pairs: str, out=None):
        """rms_norm_rotary of x `[B, H, N, D]`; None where the kernels do not serve it."""
        over = "head" if norm.normalized_shape[0] == x.shape[-1] else "token"

        def compute(weight, _, backend):
            return rms_norm_rotary(
                x, weight, rotation, eps=eps_of(norm), over=over, pairs=pairs, out=out, backend=backend
            )

        return self._run(norm, x, measured.ROTARY, compute)

    def _run(self, norm, x, kind, compute):
        backend = self.backend_for(norm, x)
        if backend is None:
            return None
        comfy.ops.run_every_op()
        with weights_of(norm, x) as (weight, bias):
            if any(row is not None and row.dtype != x.dtype for row in (weight, bias)):
                return None  # torch would promote, or refuse
            try:
                result = compute(weight, bias, backend)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if backend != "triton":
                    raise
                support.retire(error)
                return None
        self.calls[kind] += 1
        return result


def eps_of(norm: torch.nn.Module) -> float:
    return EPS_OF_NONE if norm.eps is None else norm.eps


@contextlib.contextmanager
def weights_of(norm: torch.nn.Module, x: torch.Tensor):
    """The norm's weight and bias where x is, cast, patched and streamed in as the host does for its own call."""
    bias = getattr(norm, "bias", None)
    cast = (
        getattr(norm, "comfy_cast_weights", False)
        or getattr(norm, "weight_function", ())
        or getattr(norm, "bias_function", ())
    )
    if norm.weight is None or not cast:
        yield norm.weight, bias
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(norm, weight, bias, stream)


def norm_forward(fused: Fused, own):
    """The forward of a norm that stands alone. own: the class's."""

    def forward(self, x):
        result = None if torch.compiler.is_compiling() else fused.norm(self, x)
        return own(self, x) if result is None else result

    return forward


class Deferring:
    """In a norm's place: puts the norm off."""

    def __init__(self, fused: Fused, norm: torch.nn.Module):
        self.fused, self.norm = fused, norm

    def __call__(self, x: torch.Tensor):
        if self.fused.backend_for(self.norm, x) is None:
            return self.norm(x)
        return Deferred(self.fused, self.norm, x)


class Direct:
    """In a norm's place: computes it by the kernels at once."""

    def __init__(self, fused: Fused, norm: torch.nn.Module):
        self.fused, self.norm = fused, norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result = self.fused.norm(self.norm, x)
        return self.norm(x) if result is None else result


class PutOff:
    """Stands for a tensor that is not computed yet. Any torch function but those it knows computes it first."""

    def tensor(self) -> torch.Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.addcmul and len(args) == 3 and not kwargs and isinstance(args[1], Deferred):
            return args[1].modulated(args[2], args[0], torch.addcmul)
        if function is torch.cat and all(isinstance(part, Deferred) for part in args[0]) and kwargs == {"dim": 2}:
            return Joined(list(args[0]))
        args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, PutOff) else x, (args, kwargs))
        return function(*args, **kwargs)


class Deferred(PutOff):
    """norm(x), not computed yet."""

    def __init__(self, fused: Fused, norm: torch.nn.Module, x: torch.Tensor, shape: torch.Size | None = None):
        self.fused, self.norm, self.x = fused, norm, x
        self.shape = x.shape if shape is None else shape

    def view(self, *shape: int) -> "Deferred":
        return Deferred(self.fused, self.norm, self.x, self.x.view(*shape).shape)

    def tensor(self) -> torch.Tensor:
        result = self.fused.norm(self.norm, self.x)
        return (self.norm(self.x) if result is None else result).view(self.shape)

    def modulated(self, factor: torch.Tensor, shift: torch.Tensor, own) -> torch.Tensor:
        """norm(x) * factor + shift. own: the model's function of shift, normalised tensor and factor."""
        result = self.fused.norm(self.norm, self.x, factor, shift) if self.shape == self.x.shape else None
        return own(shift, self.tensor(), factor) if result is None else result

    def __mul__(self, factor: torch.Tensor) -> "Product":
        return Product(self, factor)

    def rotated(self, rotation: torch.Tensor, pairs: str, own, heads_first: bool, out=None) -> torch.Tensor:
        """The queries or keys, rotated. heads_first: they are `[B, H, N, D]`, otherwise `[B, N, H, D]`, as the table is.

        own: the model's function of the normalised tensor and the table. out: `[B, H, N, D]`, with heads_first.
        """
        x, table = self.x.view(self.shape), rotation
        if not heads_first:
            out = torch.empty(self.shape, dtype=x.dtype, device=x.device)
            x, table = x.transpose(1, 2), table.transpose(1, 2)
        result = None
        if fits(table, x, self.norm):
            result = self.fused.rotary(self.norm, x, table, pairs, out if heads_first else out.transpose(1, 2))
        if result is None:
            own_result = own(self.tensor(), rotation)
            return out.copy_(own_result) if heads_first and out is not None else own_result
        return result if heads_first else result.transpose(1, 2)


class Product(PutOff):
    """norm(x) * factor, not computed yet: a shift may follow."""

    def __init__(self, deferred: Deferred, factor: torch.Tensor):
        self.deferred, self.factor = deferred, factor

    def __add__(self, shift: torch.Tensor) -> torch.Tensor:
        return self.deferred.modulated(self.factor, shift, lambda shift, x, factor: x * factor + shift)

    def tensor(self) -> torch.Tensor:
        return self.deferred.tensor() * self.factor


class Joined(PutOff):
    """Queries or keys of several streams one after another, `[B, H, N, D]`, none of them normalised yet."""

    def __init__(self, parts: list[Deferred]):
        self.parts = parts
        b, h, _, d = parts[0].shape
        self.shape = torch.Size((b, h, sum(part.shape[2] for part in parts), d))

    def tensor(self) -> torch.Tensor:
        return torch.cat([part.tensor() for part in self.parts], dim=2)

    def rotated(self, rotation: torch.Tensor, pairs: str, own, heads_first: bool) -> torch.Tensor:
        """Each part goes to its own place in the result: there is nothing left to join."""
        if rotation.dim() != 6 or rotation.shape[2] != self.shape[2]:
            return own(self.tensor(), rotation)
        x = self.parts[0].x
        out, start = torch.empty(self.shape, dtype=x.dtype, device=x.device), 0
        for part in self.parts:
            tokens = slice(start, start := start + part.shape[2])
            part.rotated(rotation[:, :, tokens], pairs, own, heads_first, out[:, :, tokens])
        return out


def fits(table: torch.Tensor, x: torch.Tensor, norm: torch.nn.Module) -> bool:
    """Whether the kernels take this table `[B, H, N, D/2, 2, 2]` for x `[B, H, N, D]` and this norm."""
    b, h, n, d = x.shape
    return (
        table.dim() == 6
        and table.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and table.shape[2:] == (n, d // 2, 2, 2)
        and table.shape[0] in (1, b)
        and table.shape[1] in (1, h)
        and isinstance(norm, torch.nn.RMSNorm)
        and norm.normalized_shape in ((d,), (h * d,))
    )
