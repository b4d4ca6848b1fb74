"""Node SVG2SparseAttentionRay: between Raylight's model loader and its sampler."""

from comfy_api.latest import io

from ..svg2_core.ops import registry
from ..svg2_core.presets import FAMILIES
from .patching.knobs import resolve
from .raylight import actors
from .sparse_attention import Stats, SVG2SparseAttention, place_in_graph
from .telling.live import Live

RayActors = io.Custom("RAY_ACTORS")

RING_ERROR = (
    "ray_actors: Raylight was started with ring_degree {ring}: no GPU sees all keys then, and SVG2 has nothing to choose from. Set "
    "ring_degree to 1 and ulysses_degree to the number of GPUs"
)
PIPEFUSION_ERROR = "ray_actors: Raylight was started with PipeFusion, whose attention mixes keys of two steps: SVG2 does not serve it"


class SVG2SparseAttentionRay(io.ComfyNode):
    """Hang SVG2 on the models in Raylight's workers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        knobs = [i for i in SVG2SparseAttention.define_schema().inputs if i.id not in ("model", "dense_attention")]
        return io.Schema(
            node_id="SVG2SparseAttentionRay",
            display_name="SVG2 Sparse Attention (Ray)",
            category="model/patch/svg2",
            description=(
                "SVG2 Sparse Attention on several GPUs, by Raylight's workers: each answers its share of the attention heads. Place it between "
                "Raylight's model loader and its sampler. The workers keep what they were told: to go without SVG2, switch enabled off."
            ),
            search_aliases=["sparse attention ray", "raylight svg2", "svg2 multi gpu"],
            inputs=[
                RayActors.Input("ray_actors", tooltip="Raylight's workers, with a video model loaded: Wan, HunyuanVideo, Cosmos, LTX-Video, MiniMax-H3. With ring_degree 1."),
                *knobs,
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            not_idempotent=True,
            outputs=[
                RayActors.Output(tooltip="The same workers, whose models have sparse attention."),
                Stats.Output("stats", tooltip="What ran and why on all GPUs, for SVG2 Report."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, ray_actors, enabled=True, preset="auto", backend="auto", **knobs) -> io.NodeOutput:
        if not actors.is_installed():
            raise ValueError(actors.NOT_INSTALLED)
        workers = ray_actors["workers"]
        stats, node = actors.GatheredStats(ray_actors), place_in_graph(cls.hidden)
        if not enabled:
            actors.change_models(ray_actors, [actors.remote_call("unpatch")] * len(workers))
            actors.LiveRelay.stop(ray_actors)
            Live(node).off()
            return io.NodeOutput(ray_actors, stats)
        registry.check_name(backend)
        for family in FAMILIES:  # a mistake in a knob is told here and now, whatever model the workers hold
            resolve(family, preset, **knobs)
        degrees = actors.parallelism(ray_actors)
        if (ring := degrees.get("ring_degree") or 1) > 1:
            raise ValueError(RING_ERROR.format(ring=ring))
        if degrees.get("pipefusion_enabled"):
            raise ValueError(PIPEFUSION_ERROR)
        values = {"token": stats.token, "preset": preset, "backend": backend, "knobs": knobs, "gpus": degrees.get("ulysses_degree") or 1}
        queue = None if node is None else actors.LiveRelay(ray_actors, node, stats).queue
        queues = [queue, *[None] * (len(workers) - 1)]  # the first one tells
        try:
            actors.change_models(ray_actors, [actors.remote_call("patch", **values, queue=q) for q in queues])
        except BaseException:
            actors.LiveRelay.stop(ray_actors)
            raise
        return io.NodeOutput(ray_actors, stats)
