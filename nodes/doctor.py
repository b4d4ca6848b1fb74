"""Node SVG2Doctor: what this machine has, which kernels work on it, and what they gain here."""

import time

import comfy.model_management
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.latest import io, ui

from ..cuda import driver, survey
from ..svg2_core.attention import svg2_attention
from ..svg2_core.layout import Layout
from ..svg2_core.metrics import rel_l2
from ..svg2_core.ops import registry
from ..svg2_core.presets import preset_config
from ..svg2_core.reasons import Refusal
from ..svg2_core.stopwatch import Stopwatch

HEAD_DIM, TOPICS = 128, 200
# Of the speed test: tokens, heads and precision. Short enough for two seconds, long enough for sparse attention to pay.
SIZES = {"cuda": (16_384, 8, torch.bfloat16), "cpu": (10_240, 2, torch.float32)}
SECONDS = 1.0


class SVG2Doctor(io.ComfyNode):
    """Says what runs here and why not something faster; tries every backend on a tiny case."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVG2Doctor",
            display_name="SVG2 Doctor",
            category="model/patch/svg2",
            description="Checks GPU, driver, Triton and the prebuilt kernels, tests each backend, and times sparse against dense attention.",
            search_aliases=["svg2 doctor", "svg2 not faster", "svg2 check", "triton check"],
            inputs=[],
            outputs=[io.String.Output("report", tooltip="The findings as text.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls) -> float:
        return time.time()  # the machine may have changed: never from the cache

    @classmethod
    def execute(cls) -> io.NodeOutput:
        device = comfy.model_management.get_torch_device()
        found = survey.survey()
        lines = [*survey.lines(found), f"ComfyUI uses: {device}", *backend_lines(device), *speed_lines(device)]
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
            origin = f", {driver.load(registry.PREBUILT[name], device).origin}" if name in registry.PREBUILT else ""
            lines.append(f"backend {name}: ready (self-test {seconds:.1f} s{origin})")
    chosen = registry.choose("auto", call)
    lines.append("auto takes: " + (f"dense attention ({chosen.detail})" if isinstance(chosen, Refusal) else chosen))
    return lines


def speed_lines(device: torch.device) -> list[str]:
    """Dense against sparse on made-up activations of a few topics, about a second each."""
    if device.type not in SIZES:
        return [f"speed: not tested: this test is for NVIDIA GPUs and CPUs, not for {device.type}"]
    tokens, heads, dtype = SIZES[device.type]
    call = registry.Call(device, dtype, HEAD_DIM)
    backend = registry.choose("auto", call)
    if isinstance(backend, Refusal):
        return ["speed: not tested, because no backend is ready"]
    try:
        q, k, v = made_up(device, tokens, heads, dtype)
        config = preset_config("auto", "other")
        past = svg2_attention(q, k, v, Layout(0, tokens), config, backend=backend)

        def dense():
            return optimized_attention(q, k, v, heads, skip_reshape=True, skip_output_reshape=True)

        def sparse():
            return svg2_attention(q, k, v, Layout(0, tokens), config, past.centroids, backend=backend)

        error = rel_l2(sparse().out, dense())
        dense_ms, sparse_ms = median_ms(dense, device), median_ms(sparse, device)
    except Exception as error:  # the report is wanted most where something is broken
        return [f"speed: the test failed ({type(error).__name__}: {error})"]
    return [
        f"speed at {tokens:,} tokens, {heads} heads: ComfyUI's attention {dense_ms:.2f} ms, SVG2 ({backend}) {sparse_ms:.2f} ms, "
        f"{dense_ms / sparse_ms:.2f}x, density {past.density.item():.0%}, relative error {error:.3f}. "
        "The more tokens a video has, the more there is to gain."
    ]


def made_up(device: torch.device, tokens: int, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v `[1, H, N, D]`: tokens of a topic are alike, and queries look for the topic of their neighbours."""
    g = torch.Generator(device).manual_seed(0)
    topics = torch.randn(heads, TOPICS, HEAD_DIM, generator=g, device=device)
    which = torch.arange(tokens, device=device) * TOPICS // tokens
    return tuple(
        (topics[:, which] + 0.6 * torch.randn(heads, tokens, HEAD_DIM, generator=g, device=device))[None].to(dtype)
        for _ in range(3)
    )


def median_ms(call, device: torch.device) -> float:
    """Milliseconds of a call, the median over about a second."""
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < SECONDS or len(times) < 3:
        watch = Stopwatch(device)
        call()
        watch.stop()
        times.append(1000 * watch.seconds())
    return sorted(times)[len(times) // 2]
