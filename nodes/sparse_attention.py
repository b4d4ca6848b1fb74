"""Node SVG2SparseAttention: between the model loader and the sampler."""

import logging

from comfy_api.latest import io

from ..svg2_core.config import COMPENSATION, MAX_CLUSTERS
from ..svg2_core.ops import registry
from ..svg2_core.presets import FAMILIES, PRESETS, preset_config
from ..svg2_core.reasons import Refusal
from ..svg2_core.stats import StatsHandle
from .patching import dense_attention as dense
from .patching.knobs import resolve
from .patching.layouts import preset_family
from .patching.patch import Settings, apply_patch
from .telling.live import Live

log = logging.getLogger("svg2")

Stats = io.Custom("SVG2_STATS")


class SVG2SparseAttention(io.ComfyNode):
    """Patch a clone of the model so that its video self-attention runs sparse."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVG2SparseAttention",
            display_name="SVG2 Sparse Attention",
            category="model/patch/svg2",
            description=(
                "Computes a video diffusion model's self-attention only where it matters (Sparse VideoGen2), without retraining. "
                "Place it between the model and the sampler. Knobs at their auto value follow the preset."
            ),
            search_aliases=["sparse attention", "svg2", "sparse videogen", "speed up wan", "speed up hunyuan", "faster video"],
            # All but the model are optional: a prompt saved before an input was added stays valid.
            inputs=[
                io.Model.Input("model", tooltip="A video diffusion model: Wan, HunyuanVideo, Cosmos and others. What SVG2 cannot serve runs dense, with the reason in the log."),
                io.Boolean.Input("enabled", optional=True, default=True, tooltip="Off passes the model through untouched, to compare."),
                io.Combo.Input("preset", optional=True, options=list(PRESETS), default="auto", extra_dict={"svg2_presets": preset_values()},
                    tooltip="Fills every knob left at auto. auto: balanced. quality: closest to dense. turbo: least work. paper: the published settings, without compensation."),
                io.Int.Input("q_clusters", optional=True, default=0, min=0, max=MAX_CLUSTERS, tooltip="Groups of query tokens per head. 0: auto, grows with the number of tokens."),
                io.Int.Input("k_clusters", optional=True, default=0, min=0, max=MAX_CLUSTERS, tooltip="Groups of key tokens per head. 0: auto, grows with the number of tokens."),
                io.Float.Input("top_p", optional=True, default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="The paper's rule in place of density: share of the attention mass that is computed exactly. Higher: closer to dense, slower. 1: equals dense. 0: auto."),
                io.Int.Input("warmup_steps", optional=True, default=-1, min=-1, max=10000, tooltip="Leading steps kept dense, in the sampler that begins the generation. -1: auto."),
                io.Float.Input("min_k_ratio", optional=True, default=-1.0, min=-1.0, max=1.0, step=0.01, advanced=True,
                    tooltip="With top_p: least share of the key groups computed exactly for each query group. -1: auto."),
                io.Int.Input("kmeans_init_iters", optional=True, default=0, min=0, max=1000, advanced=True, tooltip="k-means iterations at a block's first sparse step. 0: auto."),
                io.Int.Input("kmeans_iters", optional=True, default=0, min=0, max=1000, advanced=True, tooltip="k-means iterations at each later step. 0: auto."),
                io.Float.Input("end_percent", optional=True, default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Share of each sampler's own steps after which attention is dense again. 1: never."),
                io.String.Input("dense_blocks", optional=True, default="auto", advanced=True,
                    tooltip='Transformer blocks kept dense, such as "0-2,-1" (negative counts from the last). Empty: none.'),
                io.Int.Input("min_tokens", optional=True, default=-1, min=-1, max=2**24, advanced=True, tooltip="Shorter sequences stay dense: there is nothing to gain. -1: auto."),
                io.Combo.Input("compensation", optional=True, options=["auto", *COMPENSATION], default="auto", advanced=True,
                    tooltip="What stands in for skipped groups. first_order: their mass, and how their mean value moves with the query. centroid: their mean alone. off: nothing, as in the paper."),
                io.Combo.Input("backend", optional=True, options=["auto", *registry.NAMES], default="auto", advanced=True,
                    tooltip="Which kernels compute the sparse calls. auto: on a GPU the first that it supports, in the order that measurements gave (nothing is measured yet, so the prebuilt CUDA near field comes first, then Triton's); on a CPU sdpa, which is torch's own attention and products and runs by name on any device."),
                io.Combo.Input("dense_attention", optional=True, options=["auto", *dense.NAMES], default="auto", advanced=True,
                    tooltip="What computes the steps and blocks that stay dense. auto: what the checkpoint asks for, or the attention ComfyUI was started with. flash: the flash-attn package, as exact. sage: the sageattention package, and int8: ComfyUI's own INT8 attention; both quantised, for speed, and less exact. SVG2 Doctor says which are there."),
                # Last: files keep the values of a node's inputs by their places.
                io.Float.Input("density", optional=True, default=0.0, min=0.0, max=1.0, step=0.005,
                    tooltip="Share of the pairs of video tokens that is computed exactly; pairs are chosen by the error of leaving them out. Higher: closer to dense, slower. 1: equals dense. 0: auto. Not together with top_p."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            # Two nodes with the same knobs on the same model each report what they did; the host's cache would make them one.
            not_idempotent=True,
            outputs=[
                io.Model.Output(tooltip="The model with sparse attention."),
                Stats.Output("stats", tooltip="What ran and why, for SVG2 Report."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model,
        enabled=True,
        preset="auto",
        q_clusters=0,
        k_clusters=0,
        top_p=0.0,
        warmup_steps=-1,
        min_k_ratio=-1.0,
        kmeans_init_iters=0,
        kmeans_iters=0,
        end_percent=1.0,
        dense_blocks="auto",
        min_tokens=-1,
        compensation="auto",
        backend="auto",
        dense_attention="auto",
        density=0.0,
    ) -> io.NodeOutput:
        config = resolve(
            preset_family(model), preset, density, top_p, q_clusters=q_clusters, k_clusters=k_clusters, warmup_steps=warmup_steps,
            min_k_ratio=min_k_ratio, kmeans_init_iters=kmeans_init_iters, kmeans_iters=kmeans_iters, end_percent=end_percent,
            dense_blocks=dense_blocks, min_tokens=min_tokens, compensation=compensation,
        )  # fmt: skip
        registry.check_name(backend)
        handle = StatsHandle()
        node = place_in_graph(cls.hidden)
        if not enabled:
            Live(node).off()
            return io.NodeOutput(model, handle)
        settings = Settings(config, backend, handle, preset, node, dense=_dense_attention(dense_attention))
        return io.NodeOutput(apply_patch(model, settings), handle)


def place_in_graph(hidden: io.HiddenHolder | None) -> str | None:
    """The node's id in the graph on the screen, also where another node expanded into it; None: called by a script."""
    if hidden is None or hidden.unique_id is None:
        return None
    return hidden.dynprompt.get_display_node_id(hidden.unique_id) if hidden.dynprompt else hidden.unique_id


def _dense_attention(choice: str) -> dense.DenseAttention | None:
    """What computes dense calls in place of the host's choice; None for auto, and for flash where it is not there.

    Without flash the video is the same, so a word in the log will do. Without the others it would be another video: an error.
    """
    if choice == "auto":
        return None
    found = dense.find(choice) if choice in dense.NAMES else None
    if isinstance(found, dense.DenseAttention):
        return found
    if choice == "flash":
        log.warning("SVG2: dense_attention is flash, but %s; ComfyUI's own attention is used", found.detail)
        return None
    accepted = ["auto", *(name for name in dense.NAMES if name == "flash" or not isinstance(dense.find(name), Refusal))]
    why = f" ({found.detail})" if found else ""
    raise ValueError(f"dense_attention: {choice!r} is not accepted; it takes {' or '.join(accepted)} on this machine{why}")


def preset_values(tokens: int = 75_600) -> dict[str, dict]:
    """What each preset stands for, for the panel in the node: clusters at the length of a 720p video of Wan's."""

    def values(name: str) -> dict:
        config, others = preset_config(name, FAMILIES[0]), [preset_config(name, family) for family in FAMILIES[1:]]
        q_clusters, k_clusters = config.cluster_counts(tokens)
        return {
            "name": "balanced" if name == "auto" else name,
            "q_clusters": q_clusters,
            "k_clusters": k_clusters,
            "tokens": tokens,
            "density": config.density,
            "top_p": config.top_p,
            "warmup_fraction": config.warmup_fraction,
            "min_k_ratio": config.min_k_ratio,
            "kmeans_init_iters": config.kmeans_init_iters,
            "kmeans_iters": config.kmeans_iters,
            "dense_blocks": config.dense_blocks,
            "compensation": config.compensation,
            "by_model": any(other != config for other in others),  # in warm-up and clusters
        }

    return {name: values(name) for name in PRESETS}

