"""Node SVG2FusedOps: norms, modulation and rotary embedding in one pass, where that is known to be faster."""

import logging

import comfy.quant_ops
import torch
from comfy_api.latest import io, ui

from ..svg2_core.ops.norm_rope import measured, support
from .fused.install import Plan, apply_patch, plan

OPS = ("auto", "all")

log = logging.getLogger("svg2")


class SVG2FusedOps(io.ComfyNode):
    """Patch a clone of the model so that its norms and rotary embedding run in SVG2's kernels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVG2FusedOps",
            display_name="SVG2 Fused Ops",
            category="model/patch/svg2",
            description=(
                "Computes RMSNorm and LayerNorm together with the modulation or rotary embedding after them, in one pass "
                "over memory. Replaces only what a measurement on this kind of GPU shows to be faster; so far there is none."
            ),
            search_aliases=["fused norm", "fused rope", "svg2 fused", "rmsnorm kernel"],
            # All but the model are optional: a prompt saved before an input was added stays valid.
            inputs=[
                io.Model.Input("model", tooltip="A video diffusion model: Wan, HunyuanVideo, Cosmos, LTX-Video, Kandinsky and others."),
                io.Boolean.Input("enabled", optional=True, default=True, tooltip="Off passes the model through untouched, to compare."),
                io.Combo.Input("ops", optional=True, options=list(OPS), default="auto",
                    tooltip="auto: only what was measured to be faster on this kind of GPU; nothing yet. all: everything that is recognised, to try."),
                io.Combo.Input("backend", optional=True, options=list(support.BACKENDS), default="auto", advanced=True,
                    tooltip="auto: Triton on an NVIDIA GPU, plain torch on a CPU (which is slower than the model's own)."),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with fused operations."),
                io.String.Output("report", tooltip="What was replaced, and why not the rest."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, enabled=True, ops="auto", backend="auto") -> io.NodeOutput:
        if ops not in OPS:
            raise ValueError(f"ops: {ops!r} is not accepted; it takes {', '.join(OPS)}")
        if backend not in support.BACKENDS:
            raise ValueError(f"backend: {backend!r} is not accepted; it takes {', '.join(support.BACKENDS)}")
        network, device = model.get_model_object("diffusion_model"), model.load_device
        if not enabled:
            return told(model, "SVG2 Fused Ops is off: the model is as it was.")
        dtype = compute_dtype(model)
        found, missing = support.choose(backend, device, dtype)
        kinds = {kind for kind in measured.KINDS if found and (ops == "all" or measured.record(device, kind))}
        patches = (name.partition("diffusion_model.")[2] for name in model.object_patches)
        planned = plan(network, kinds, tuple(name for name in patches if name))
        head = f"{type(network).__name__}, {device}, {str(dtype).removeprefix('torch.')}, ops {ops}"
        reasons = [] if found else [f"the kernels cannot serve this model: {missing}"]
        if found and ops == "auto":
            reasons += [
                f"{kind}: not measured to be faster on this device" for kind in measured.KINDS if kind not in kinds
            ]
        if not planned.empty:
            model = apply_patch(model, backend, kinds)
        text = "\n".join(report(head, found, planned, reasons, device))
        log.info(text)
        return told(model, text)


def told(model, text: str) -> io.NodeOutput:
    """The node's outputs, with the report in the node itself too."""
    return io.NodeOutput(model, text, ui=ui.PreviewText(text))


def compute_dtype(model) -> torch.dtype:
    """What the model's activations are in."""
    cast = model.get_model_object("manual_cast_dtype")
    return cast if cast is not None else model.model.get_dtype()


def report(head: str, backend: str | None, planned: Plan, reasons: list[str], device: torch.device) -> list[str]:
    """For people: what runs in these kernels, what does not, and on whose word."""
    lines = [f"SVG2 Fused Ops on {head}"]
    if planned.empty:
        lines.append("Nothing was replaced: the model is as it was.")
    else:
        lines.append(f"Replaced, backend {backend}:")
        lines += [f"  {count} x {what}" for what, count in planned.replaced.items()]
        records = {measured.record(device, kind) for kind in planned.kinds}
        if None in records:
            lines.append("Not measured on a GPU yet: whether this is faster than ComfyUI's own is not known.")
        lines += [f"Measured: {record}" for record in sorted(records - {None})]
        if backend == "torch":
            lines.append("Backend torch is the plain definition, slower than the model's own code: for tests.")
    left = reasons + [f"{count} x {what}" for what, count in planned.left.items()]
    if left:
        lines += ["Left to the model's own code:", *(f"  {line}" for line in left)]
    lines.append(f"ComfyUI's own rotary kernels: comfy_kitchen, {kitchen_backends()}")
    return lines


def kitchen_backends() -> str:
    """Which of comfy_kitchen's backends are in use."""
    try:
        states = comfy.quant_ops.ck.list_backends()
    except AttributeError:
        return "not installed"
    on = [name for name, state in states.items() if state.get("available") and not state.get("disabled")]
    return ", ".join(f"{name} (plain torch)" if name == "eager" else name for name in on) or "none"
