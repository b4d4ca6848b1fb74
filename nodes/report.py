"""Node SVG2Report: what ran sparse in the last run, why the rest did not, and what the clusters look like."""

import json
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..svg2_core.reasons import Reason
from ..svg2_core.stats import RunReport
from .sparse_attention import Stats
from .telling.plots.pages import clusters_page, empty_page, error_page, run_page

NO_RUN = (
    "No run is recorded. Either SVG2 Sparse Attention is switched off (enabled), bypassed or not connected to the input stats, "
    "or nothing has been sampled with its model: connect the input samples to the sampler that uses it."
)
ERROR = (
    "Relative error of the attention itself against dense attention, on 32 queries of each head that were answered exactly too. "
    "Blocks that stand out would gain most from more density. How far the picture is from the dense one, SVG2 Compare says."
)
FAILED = "The run did not finish: it was interrupted or failed. What follows is what had run until then."


class SVG2Report(io.ComfyNode):
    """Draws and sums up the latest run of a model patched by SVG2SparseAttention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVG2Report",
            display_name="SVG2 Report",
            category="model/patch/svg2",
            description=(
                "Shows what SVG2 did in the latest run: density by block and step, why other calls ran dense, time per step, "
                "cluster sizes, and the clusters laid over the video. Place it behind the sampler."
            ),
            search_aliases=["svg2 report", "svg2 stats", "sparse attention report", "attention density", "attention clusters"],
            inputs=[
                Stats.Input("stats", optional=True, tooltip="The stats output of SVG2 Sparse Attention."),
                io.Latent.Input("samples", tooltip="The sampler's result. It is passed through unchanged; connected so that the report is made after the run."),
                io.Image.Input("images", optional=True, tooltip="The decoded frames, to lay the clusters over. Without them the clusters are shown plain."),
                io.Int.Input("overlay_block", optional=True, default=-1, min=-1, max=999,
                    tooltip="The transformer block whose clusters are shown. -1: the middle one of those that ran sparse."),
                io.Combo.Input("theme", optional=True, options=["dark", "light"], default="dark", tooltip="Colours of the plots."),
            ],
            outputs=[
                io.Latent.Output("samples", tooltip="The latent that came in, unchanged."),
                io.Image.Output("plots", tooltip="The pages of the report as a batch of pictures."),
                io.String.Output("summary", tooltip="The report as text."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, samples, stats=None, images=None, overlay_block=-1, theme="dark") -> io.NodeOutput:
        report = stats.latest() if stats else None  # the editor leaves out what a bypassed node would have given
        if report is None:
            pages, text, files = [empty_page([NO_RUN], theme)], f"SVG2: {NO_RUN}", []
        else:
            pages = draw(report, first_video(images, samples), overlay_block, theme)
            text, files = summary(report), [write_json(report)]
        plots = torch.cat([page.tensor() for page in pages])
        shown = {**ui.PreviewImage(plots, cls=cls).as_dict(), **ui.PreviewText(text).as_dict(), "svg2_json": files}
        return io.NodeOutput(samples, plots, text, ui=shown)


def draw(report: RunReport, images: torch.Tensor | None, overlay_block: int, theme: str) -> list:
    """The pages, all of one size. images: IMAGE `[F, H, W, C]` in 0..1 or None; overlay_block: -1 is the middle one."""
    warnings = ([FAILED] if not report.completed else []) + report.notices
    if not report.steps:
        return [empty_page([*warnings, report.summary], theme)]
    pages = [run_page(report, headline(report), warnings, theme)]
    if report.error is not None:
        pages.append(error_page(report, ERROR, theme))
    if report.overlays or report.q_cluster_sizes:
        pages.append(clusters_page(report, *choose_block(report, overlay_block), images, theme))
    return pages


def first_video(images: torch.Tensor | None, samples: dict) -> torch.Tensor | None:
    """The frames of the batch's first video, whose clusters are recorded: decoding puts all videos' frames in a row."""
    shape = samples["samples"].shape
    return images if images is None or len(shape) != 5 else images[: max(1, len(images) // shape[0])]


def choose_block(report: RunReport, wanted: int) -> tuple[str | None, str]:
    """The label of the block whose clusters are shown, None if there are none, and a sentence for the page."""
    there = [label for label in report.block_labels if label in report.overlays]
    if not there:
        return (
            None,
            "No clusters to lay over the video: the sequence has other tokens among the video's, such as references.",
        )
    label = there[len(there) // 2] if wanted < 0 else str(wanted)
    if label not in there:
        return (
            None,
            f"No clusters to show of block {label}: it did not run sparse in the last sparse step. Blocks that did: {', '.join(there)}.",
        )
    count = report.overlays[label].unique().numel()
    return label, (
        f"Block {label}, head 0, last sparse step: each patch is a query token, and patches of one colour are one of {count} clusters. "
        "Attention is computed between pairs of clusters: what belongs together should be in one, in space and in time."
    )


def headline(report: RunReport) -> list[str]:
    """The first lines of the page: what it came to, and with which settings."""
    parts = [f"{report.tokens:,} tokens"] if report.sparse_calls else ["every call ran dense"]
    if report.density is not None:
        parts += [
            f"density {report.density:.1%}",
            *([] if report.error is None else [f"attention error {report.error:.1%}"]),
            f"{report.sparse_share:.0%} of calls sparse",
            f"backend {report.backend}",
        ]
    if report.sparse_calls and report.attention_speedup is not None:
        parts.append(f"attention {times(report.attention_speedup, 1)} than a dense call in this run")
    shown = ("preset", "density", "top_p", "q_clusters", "k_clusters", "warmup_steps", "dense_blocks", "compensation")
    known = [name for name in shown if name in report.settings and name not in _not_in_force(report.settings)]
    settings = [f"{name} {_value(report.settings[name])}" for name in known]
    return [" · ".join(parts), " · ".join(settings)] if settings else [" · ".join(parts)]


def summary(report: RunReport) -> str:
    """The report in words, a fact a line."""
    lines = [] if report.completed else [FAILED]
    lines += [report.summary, *report.devices, *speed(report)]
    reasons = [(Reason(name), count) for name, count in report.dense_calls.items()]
    lines += [f"dense, {count:,} calls: {reason.sentence}" for reason, count in reasons if reason.expected]
    lines += [f"note: {notice}" for notice in report.notices]  # the sentences of what was not expected
    lines += quality(report)
    if report.settings:
        hidden = _not_in_force(report.settings)
        shown = {name: value for name, value in report.settings.items() if name not in hidden}
        lines.append("settings: " + ", ".join(f"{name} {_value(value)}" for name, value in shown.items()))
    return "\n".join(lines)


def quality(report: RunReport) -> list[str]:
    """How far the attention was from dense, and in which blocks most; how often clusters had to start anew."""
    lines = []
    if report.error is not None:
        rows = zip(report.block_labels, report.error_by_block_and_step, strict=True)
        means = {label: sum(known) / len(known) for label, row in rows if (known := [e for e in row if e is not None])}
        worst = sorted(means, key=means.get, reverse=True)[:3]
        most = ", ".join(f"block {label} {means[label]:.1%}" for label in worst)
        lines.append(f"attention error: {report.error:.1%} on average (on 32 exact rows a head); most in {most}")
    if report.cold_calls:
        lines.append(f"clusters started anew in {report.cold_calls:,} sparse calls after the first sparse step")
    return lines


def _not_in_force(settings: dict[str, object]) -> set[str]:
    """Settings of the rule that was not used: pairs are chosen by density or by top_p."""
    return {"top_p", "min_k_ratio"} if settings.get("density") is not None else {"density"}


def speed(report: RunReport) -> list[str]:
    """Times of this run."""
    lines = [f"time: {report.seconds:.1f} s for {len(report.steps)} steps"]
    if report.attention_speedup is not None:
        lines.append(
            f"attention: {times(report.attention_speedup)} than a dense call in this run "
            f"({report.sparse_call_ms:.2f} ms instead of {report.dense_call_ms:.2f} ms a call)"
        )
    if report.step_speedup is not None:
        lines.append(f"steps: {times(report.step_speedup)} than this run's dense steps")
    return lines


def times(ratio: float, digits: int = 2) -> str:
    """How many times faster or slower, the factor always above 1."""
    return f"{ratio:.{digits}f}x faster" if ratio >= 1 else f"{1 / ratio:.{digits}f}x slower"


def _value(value: object) -> str:
    """A setting for people; an empty text (dense_blocks) is "none", what no sparse call has determined is "auto"."""
    if value is None:
        return "auto"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def write_json(report: RunReport) -> dict[str, str]:
    """Write the report into ComfyUI's temp folder. -> where, in the form of the host's own previews."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        "svg2_report", folder_paths.get_temp_directory()
    )
    file = Path(folder, f"{name}_{counter:05}_.json")
    file.write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    return {"filename": file.name, "subfolder": subfolder, "type": "temp"}
