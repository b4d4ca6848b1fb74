"""Graphs of real nodes, drawn by a seed: a model, what stands before and after SVG2, and how it is sampled."""

import random
from dataclasses import dataclass, field

import tiny_models
import torch

VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
# Of each family, by how much they are used.
MODELS = ("wan2.1 t2v",) * 3 + ("wan2.2 14b i2v",) * 2 + (
    "wan2.1 vace", "wan2.2 5b t2v", "hunyuan_video t2v", "hunyuan_video t2v padded", "cosmos t2v", "cosmos predict2 v2w", "ltxv t2v",
    "ltxav t2v", "mochi t2v", "cogvideox t2v", "kandinsky5 lite t2v", "minimax t2v",
)  # fmt: skip
SAMPLERS = ("euler",) * 4 + ("euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "dpmpp_2m_sde", "res_multistep", "uni_pc", "lcm", "ddim", "er_sde")
SCHEDULERS = ("simple",) * 3 + ("beta", "normal", "sgm_uniform", "karras", "ddim_uniform", "linear_quadratic", "kl_optimal")
# Of the latent: frames, rows and columns, in place of the model's own. None of the tests' sizes is a multiple of a tile.
SIZES = (None, None, None, (1, 12, 12), (2, 10, 14), (4, 6, 6), (3, 18, 8))
SIZED = ("wan2.1 t2v", "hunyuan_video t2v", "hunyuan_video t2v padded", "cosmos t2v", "mochi t2v", "kandinsky5 lite t2v")


@dataclass(frozen=True)
class Graph:
    """One drawn graph; `before` and `after` name the nodes around SVG2."""

    model: str
    sampling: dict
    inputs: dict
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    size: tuple[int, int, int] | None = None
    seed: int = field(default=0, compare=False)


def draw(seed: int) -> Graph:
    r = random.Random(seed)
    model = r.choice(MODELS)
    sampling = {
        "steps": r.choice((1, 2, 2, 3, 3, 4, 5)),
        "cfg": r.choice((1.0, 1.0, 3.5)),
        "sampler": r.choice(SAMPLERS),
        "scheduler": r.choice(SCHEDULERS),
        "denoise": r.choice((1.0, 1.0, 1.0, 0.6)),
        "seed": seed,
    }
    inputs = {
        "preset": r.choice(("auto", "auto", "quality", "balanced", "turbo", "paper")),
        "min_tokens": r.choice((0, 0, 0, 0, -1)),
        "warmup_steps": r.choice((-1, 0, 0, 1, 2)),
        "dense_blocks": r.choice(("auto", "", "", "0", "0,-1", "0-99")),
        "end_percent": r.choice((1.0, 1.0, 0.5)),
        "enabled": r.random() > 0.08,
        "compensation": r.choice(("auto", "auto", "auto", "off", "centroid", "first_order")),
    }
    rule = r.random()
    if rule < 0.3:
        inputs["density"] = r.choice((0.02, 0.1, 0.5, 1.0))
    elif rule < 0.5:
        inputs["top_p"] = r.choice((0.3, 0.9, 1.0))
    if r.random() < 0.3:
        inputs |= {"q_clusters": r.choice((2, 7)), "k_clusters": r.choice((3, 11))}
    nodes = [name for name, (chance, serves) in NODES.items() if r.random() < chance and serves(model)]
    r.shuffle(nodes)
    split = r.randint(0, len(nodes))
    size = r.choice(SIZES) if model in SIZED else None
    return Graph(model, sampling, inputs, tuple(nodes[:split]), tuple(nodes[split:]), size, seed)


# Nodes


def lora(model):
    """Of the attention's matrices and norms."""
    g, weights = torch.Generator().manual_seed(0), model.model.state_dict()
    keys = [k for k, w in weights.items() if "blocks" in k and k.endswith(".weight") and w.dim() in (1, 2)]
    model = model.clone()
    model.add_patches({k: ("diff", (0.02 * torch.randn(weights[k].shape, generator=g),)) for k in keys}, 0.8)
    return model


def easy_cache(model):
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, 0.3, 0.0, 1.0, False)[0]


def lazy_cache(model):
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, 0.3, 0.0, 1.0, False)[0]


def context_windows(model):
    import comfy.context_windows as windows

    model = model.clone()
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_static"), windows.get_matching_fuse_method("pyramid"),
        context_length=3, context_overlap=1, context_stride=1, closed_loop=False, dim=2)  # fmt: skip
    windows.create_prepare_sampling_wrapper(model)
    return model


def compiled(model):
    """Block by block, as TorchCompileModel and others do, less the code generator."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    model = model.clone(disable_dynamic=True)
    blocks = len(model.get_model_object("diffusion_model").blocks)
    set_torch_compile_wrapper(model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict},
                              keys=[f"diffusion_model.blocks.{i}" for i in range(blocks)])  # fmt: skip
    return model


def _override(model, make):
    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = make(options.get("optimized_attention_override"))
    return model


def chaining_override(model):
    """Another node's attention that hands everything on."""

    def make(previous):
        return lambda func, *args, **kwargs: func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

    return _override(model, make)


def displacing_override(model):
    """One that computes everything by another function of the host's."""
    from comfy.ldm.modules.attention import attention_pytorch

    return _override(model, lambda previous: lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs))


def zero_star(model):
    from comfy_extras.nodes_cfg import CFGZeroStar

    return CFGZeroStar.execute(model)[0]


def renorm(model):
    from comfy_extras.nodes_cfg import CFGNorm

    return CFGNorm.execute(model, 1.0)[0]


def fused_ops(model):
    from svg2_pack.nodes.fused_ops import SVG2FusedOps

    return SVG2FusedOps.execute(model).result[0]


def split_batch(model):
    """A wrapper of the model's function, as many packs have one."""
    model = model.clone()
    model.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    return model


def second_svg2(model):
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    return SVG2SparseAttention.execute(model, min_tokens=0, top_p=0.5).result[0]


def _always(model: str) -> bool:
    return True


def _wan(model: str) -> bool:
    return model.startswith("wan2.1 t2v")


# How often, and for which models.
NODES = {
    "lora": (0.3, _always),
    "easy_cache": (0.12, _always),
    "lazy_cache": (0.08, _always),
    "context_windows": (0.25, lambda model: model in ("wan2.1 t2v", "hunyuan_video t2v", "cosmos t2v")),
    "compiled": (0.1, _wan),
    "chaining_override": (0.15, _always),
    "displacing_override": (0.1, lambda model: "padded" not in model and "mochi" not in model),
    "zero_star": (0.1, _always),
    "renorm": (0.1, _always),
    "fused_ops": (0.1, _always),
    "split_batch": (0.15, _always),
    "second_svg2": (0.06, _always),
}


def sample(graph: Graph, model, sparse: bool):
    """-> (the latent, SVG2's stats). model: of the graph's name. Without SVG2: the same graph with everything else in its place."""
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    stats = None
    for name in graph.before:
        if sparse or name != "second_svg2":
            model = globals()[name](model)
    if sparse:
        model, stats = SVG2SparseAttention.execute(model, **graph.inputs).result
    for name in graph.after:
        if name != "second_svg2":  # the last of two counts: ours is to be that one
            model = globals()[name](model)
    kwargs = dict(graph.sampling)
    if graph.size is not None:
        kwargs |= {"shape": torch.zeros(1, VARIANTS[graph.model].latent().shape[1], *graph.size), "noise_mask": None}
    return tiny_models.sample(VARIANTS[graph.model], model, **kwargs), stats
