"""Put fused operations into a model through its patcher, and take them out again.

A module is replaced by a view of itself: an object of a subclass that has the same attributes, not copies of them. So
the weights have one place, under the same names, whoever loads, moves, casts or patches them. Views are put in by an
injection of the ModelPatcher: the host takes them out before it loads weights or another clone, and puts them in again
for the model at hand, which after a deep copy (multi-GPU, TorchCompileModel) is not the one that the node saw. An object
patch would carry the first model's modules into the copy.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from comfy.patcher_extension import PatcherInjection

from ...svg2_core.ops.norm_rope import MAX_WIDTH, measured
from .norms import Fused, norm_forward
from .sites import HOSTS_MODULATION, HOSTS_OWN, SITES, Site, calls, digest, find

KEY = "svg2_fused_ops"  # of the injection
NORM_DIGESTS = {
    "comfy.ops.disable_weight_init.LayerNorm": "a3a5ca0126730b78",
    "comfy.ops.disable_weight_init.RMSNorm": "09507162a7ba4308",
}

log = logging.getLogger("svg2")


@dataclass
class Plan:
    """replaced, left: how many of what. kinds: of operation, that are replaced."""

    replaced: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    kinds: set[str] = field(default_factory=set)
    places: list[tuple[torch.nn.Module, str, torch.nn.Module, Site | None]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.places


def plan(network: torch.nn.Module, kinds: set[str], patched: tuple[str, ...] = ()) -> Plan:
    """What of `kinds` can be replaced in a network; places are (parent, name, module, site or None for a norm).

    patched: names below the network that other nodes' object patches will take, once the model is loaded.
    """
    found, inside, known = Plan(), set(), False
    for path, parent, name, module in children(network):
        for site, why in sites_of(module):
            known = True
            if not kinds.issuperset(site.kinds):
                continue
            label = f"{what(module)}: {', '.join(site.kinds)}"
            why = why or taken(patched, path, attribute_of(site))
            if why is None:
                found.replaced[label] += 1
                found.kinds.update(site.kinds)
                found.places.append((parent, name, module, site))
                inside.update(id(norm) for norm in norms_of(module, site))
            else:
                found.left[f"{label}: {why}"] += 1
        if kernel := hosts_own(module):
            inside.update(id(norm) for norm in module.children())
            found.left[f"{what(module)}: {measured.ROTARY}: ComfyUI itself calls comfy_kitchen.{kernel} for it"] += 1
            known = True
    if kinds and not known:
        found.left[
            "model: its blocks are not among those that this was written for, so only norms that stand alone"
        ] += 1
    if measured.NORM not in kinds:
        return found
    for path, parent, name, module in children(network):
        if not isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
            continue
        label = (
            f"{'RMSNorm' if isinstance(module, torch.nn.RMSNorm) else 'LayerNorm'} over {module.normalized_shape[-1]}"
        )
        why = norm_refused(module) or taken(patched, path, "forward")
        if why is not None:
            found.left[f"{label}: {why}"] += 1
        elif id(module) not in inside:
            found.replaced[label] += 1
            found.kinds.add(measured.NORM)
            found.places.append((parent, name, module, None))
    return found


def children(network: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, torch.nn.Module]]:
    """(path, parent, name, module) of every module below the network."""
    for above, parent in network.named_modules():
        for name, module in parent._modules.items():
            if module is not None:
                yield f"{above}.{name}" if above else name, parent, name, module


def taken(patched: tuple[str, ...], path: str, attribute: str) -> str | None:
    """Why another node's object patch leaves nothing to replace at this path; None if none does."""
    if f"{path}.{attribute}" in patched:
        return f"another node replaced its {attribute}"
    if any(f"{path}.".startswith(f"{name}.") for name in patched):
        return "another node replaced it"
    return None


def sites_of(module: torch.nn.Module) -> Iterator[tuple[Site, str | None]]:
    """The sites that a module's class has, with the reason where this module cannot be served."""
    cls = viewed(module)
    for site in SITES:
        if full_name(cls) != (site.inherits or site.owner) or not (
            site.only_if is None or getattr(module, site.only_if)
        ):
            continue
        attribute = attribute_of(site)
        if replaced(module, attribute):
            yield site, f"another node replaced its {attribute}"
        elif not site.recognised:
            why = f"its {attribute} is not the one of ComfyUI 0.30 that this was written for"
            if measured.MODULATION in site.kinds and calls(site.method, HOSTS_MODULATION):
                why += f", and itself calls comfy_kitchen.{HOSTS_MODULATION} for the modulation"
            yield site, why
        else:
            refused = [norm_refused(norm) for norm in norms_of(module, site)]
            yield site, next((why for why in refused if why is not None), None)


def hosts_own(module: torch.nn.Module) -> str | None:
    """The kernel of comfy_kitchen by which the host itself does what a site would, where it is so in this version."""
    name = full_name(viewed(module))
    method, kernel = HOSTS_OWN.get(name, ("", ""))
    return kernel if kernel and getattr(module, "is_selfattn", True) and calls(f"{name}.{method}", kernel) else None


def replaced(module: torch.nn.Module, attribute: str) -> bool:
    """Whether a method was replaced on this very module."""
    return attribute in module.__dict__ and not leftover(module, attribute)


def leftover(module: torch.nn.Module, attribute: str) -> bool:
    """Whether the module holds its own class's method: so the host leaves it when it takes an object patch back."""
    method = module.__dict__.get(attribute)
    return getattr(method, "__self__", None) is module and method.__func__ is getattr(viewed(module), attribute)


def norms_of(module: torch.nn.Module, site: Site) -> list[torch.nn.Module]:
    return [module.get_submodule(name) for name in site.norms]


def norm_refused(norm: torch.nn.Module) -> str | None:
    """Why a norm is not computed by these kernels; None if it is."""
    cls = viewed(norm)
    if replaced(norm, "forward"):
        return "another node replaced its forward"
    if cls not in (torch.nn.LayerNorm, torch.nn.RMSNorm):
        for name, known in NORM_DIGESTS.items():
            base = find(name)
            if (
                issubclass(cls, base)
                and cls.forward is base.forward
                and cls.forward_comfy_cast_weights is base.forward_comfy_cast_weights
            ):
                if digest(f"{name}.forward", f"{name}.forward_comfy_cast_weights") != known:
                    return "its forward is not the one of ComfyUI 0.30 that this was written for"
                break
        else:
            return f"{cls.__name__} is not a norm that this was written for"
    if len(norm.normalized_shape) != 1 or norm.normalized_shape[0] > MAX_WIDTH:
        return f"a norm over {list(norm.normalized_shape)}"
    return None


def attribute_of(site: Site | None) -> str:
    """The method that is replaced there; None is a norm that stands alone."""
    return "forward" if site is None else site.method.rpartition(".")[2]


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def what(module: torch.nn.Module) -> str:
    return viewed(module).__name__


# Views


class View:
    """Marks the classes of views."""


def viewed(module: torch.nn.Module) -> type:
    """A module's own class, if it is a view too."""
    cls = type(module)
    return cls.viewed if issubclass(cls, View) else cls


class Views:
    """Views of modules, of one node: the same view for the same module and sites, so that compiled code stays valid."""

    def __init__(self, fused: Fused):
        self.fused = fused
        self._classes: dict[tuple, type] = {}
        self._views = weakref.WeakKeyDictionary()

    def of(self, module: torch.nn.Module, sites: tuple[Site | None, ...]) -> torch.nn.Module:
        cls = self._class(viewed(module), sites)
        view = self._views.get(module)
        if type(view) is not cls:
            view = object.__new__(cls)
            object.__setattr__(view, "__dict__", module.__dict__)
            self._views[module] = view
        return view

    def _class(self, cls: type, sites: tuple[Site | None, ...]) -> type:
        key = (cls, sites)
        if key not in self._classes:
            bases, methods = (cls, View), {"viewed": cls}
            for site in sites:
                name, method = self._method(cls, site)
                if site is None or site.inherits is None:
                    methods[name] = method
                else:  # behind the class's own method, which calls its parent's
                    owner = find(site.owner)
                    bases = (cls, type(owner.__name__, (owner,), {name: method}), View)
            self._classes[key] = type(cls.__name__, bases, methods)
        return self._classes[key]

    def _method(self, cls: type, site: Site | None) -> tuple[str, Callable]:
        if site is None:
            return "forward", norm_forward(self.fused, cls.forward)
        return attribute_of(site), site.make(self.fused, find(site.method))


# The patcher

# model -> [(parent, name, module, view, methods that the module held itself)]
_installed: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()


def apply_patch(model, backend: str, kinds: set[str]):
    """A clone of the ModelPatcher `model` with fused operations of these kinds. Earlier ones of this node are replaced."""
    model = model.clone()
    views = Views(Fused(backend))

    def inject(patcher):
        eject(patcher)
        install(patcher.model, views, kinds)

    def eject(patcher):
        remove(patcher.model)

    model.set_injections(KEY, [PatcherInjection(inject, eject)])
    model.set_attachments(KEY, views.fused)
    return model


def install(model: torch.nn.Module, views: Views, kinds: set[str]) -> None:
    """Put views in the place of modules of the model, which has none."""
    planned = plan(model.diffusion_model, kinds)
    sites: dict[tuple[int, str], list] = {}
    for parent, name, module, site in planned.places:
        sites.setdefault((id(parent), name), [parent, module]).append(site)
    done = _installed[model] = []
    for (_, name), (parent, module, *of_module) in sites.items():
        view = views.of(module, tuple(of_module))
        held = {
            attribute: module.__dict__.pop(attribute)
            for attribute in map(attribute_of, of_module)
            if leftover(module, attribute)
        }
        parent._modules[name] = view
        done.append((parent, name, module, view, held))


def remove(model: torch.nn.Module) -> None:
    """Take the views out that `install` put in; what another node has put there since stays."""
    for parent, name, module, view, held in _installed.pop(model, []):
        module.__dict__.update(held)
        if parent._modules.get(name) is view:
            parent._modules[name] = module
