"""Node SVG2Doctor: what this machine has, which kernels work on it, and what they gain here."""

import time

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..cuda import driver, survey
from ..svg2_core.metrics import rel_l2
from ..svg2_core.ops import registry
from ..svg2_core.reasons import Refusal
from .measuring.measure import DENSE_ERROR, HEAD_DIM, SIZES, in_words, measure
from .measuring.record import how_to_send, save
from .patching import dense_attention


class SVG2Doctor(io.ComfyNode):
    """Says what runs here and why not something faster; tries every backend on a tiny case."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVG2Doctor",
            display_name="SVG2 Doctor",
            category="model/patch/svg2",
            description="Checks GPU, driver, Triton and the prebuilt kernels, tests each backend, and measures sparse against dense attention, with a record of it in the output folder.",
            search_aliases=["svg2 doctor", "svg2 not faster", "svg2 check", "triton check"],
            inputs=[
                io.Boolean.Input("measure", optional=True, default=True,
                    tooltip="Time sparse against dense attention here, in about ten seconds, and save a record in the output folder. Off: only what can run."),
            ],
            outputs=[io.String.Output("report", tooltip="The findings as text.")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, measure=True) -> float:
        return time.time()  # the machine may have changed: never from the cache

    @classmethod
    def execute(cls, measure=True) -> io.NodeOutput:
        device = comfy.model_management.get_torch_device()
        found = survey.survey()
        lines = [*survey.lines(found), f"ComfyUI uses: {device}", *backend_lines(device), *dense_lines(device)]
        lines += speed_lines(device) if measure else []
        text = "\n".join(lines)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def backend_lines(device: torch.device) -> list[str]:
    """Each backend with "ready" or the reason it is not. One that failed earlier in this process is given another try."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    call = registry.Call(device, dtype, HEAD_DIM)
    driver.forget()  # a file that could not be loaded, too
    lines = []
    for name in registry.NAMES:
        before = registry.retired(name)
        if before:
            registry.reinstate(name)
            lines.append(f"backend {name}: had failed ({before}); trying again")
        began = time.perf_counter()
        answer = registry.choose(name, call)
        seconds = time.perf_counter() - began
        if isinstance(answer, Refusal):
            lines.append(f"backend {name}: not ready: {answer.detail.removeprefix(f'{name}: ')}")
        else:
            origin = f", {driver.load(registry.PREBUILT[name].source, device).origin}" if name in registry.PREBUILT else ""
            lines.append(f"backend {name}: ready (self-test {seconds:.1f} s{origin})")
    chosen = registry.choose("auto", call)
    lines.append("auto takes: " + (f"dense attention ({chosen.detail})" if isinstance(chosen, Refusal) else chosen))
    return lines


def dense_lines(device: torch.device) -> list[str]:
    """Each attention that the input dense_attention can name, with "ready" or the reason it is not."""
    dense_attention.forget()  # one that failed earlier is given another try, too
    return [f"dense_attention {name}: {_dense_state(name, device)}" for name in dense_attention.NAMES]


def _dense_state(name: str, device: torch.device) -> str:
    found = dense_attention.find(name)
    if isinstance(found, Refusal):
        return f"not ready: {found.detail}"
    if not found.quantised:  # the host's function of flash-attn cannot be tried: torch answers what that refuses
        return "ready" if device.type == "cuda" else "not ready: it is for GPUs"
    try:
        error = _dense_error(found, device)
    except Exception as failure:  # a wrong shape, say
        error = in_words(failure)
    if isinstance(error, str):
        return f"not ready: {error}"
    if not error <= DENSE_ERROR:
        return f"not ready: wrong result (relative error {error:.4f}, where at most {DENSE_ERROR} is expected)"
    return f"ready (relative error {error:.4f} on random numbers; 0 is exact)"


def _dense_error(choice: dense_attention.DenseAttention, device: torch.device) -> float | str:
    """How far it is from exact attention on a tiny case, or why it does not answer."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = torch.randn(3, 1, 2, 256, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    out = choice.answer(q, k, v, 2, {"mask": None, "skip_reshape": True, "skip_output_reshape": True})
    if isinstance(out, str):
        return out
    return rel_l2(out.cpu(), torch.nn.functional.scaled_dot_product_attention(*(x.float().cpu() for x in (q, k, v))))


def speed_lines(device: torch.device) -> list[str]:
    """Dense against sparse, and where the record of it lies."""
    if device.type not in SIZES:
        return [f"speed: not measured: this is for NVIDIA GPUs and CPUs, not for {device.type}"]
    backend = registry.choose("auto", registry.Call(device, SIZES[device.type][2], HEAD_DIM))
    if isinstance(backend, Refusal):
        return [f"speed: not measured, because no backend is ready ({backend.detail})"]
    lines, records = measure(device, backend)
    if records:
        try:
            lines.append(how_to_send(save(records, device)))
        except Exception as error:  # a full disk, or a GPU that is lost: the report still comes
            lines.append(f"record: it could not be saved ({error}); copy this text instead")
    return lines
