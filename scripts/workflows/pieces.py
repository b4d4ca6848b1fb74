"""What several workflows have in common: texts, the loaders of a family, the columns that all of them have."""

# ruff: noqa: RUF001  (Chinese commas)
from . import files, notes
from .graph import Graph, Node, Output

WAN_NEGATIVE = (  # Wan's own, which its authors recommend for all its models
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
HARBOUR = "A small red fishing boat leaves a harbour at dawn, mist over calm water, gulls circling, the camera follows at a distance, soft golden light, cinematic."
MARKET = "A busy night market in the rain, lanterns reflected in puddles, people with umbrellas pass by, steam rises from food stalls, the camera glides slowly forward."
FOX = "A fox runs through deep snow between pine trees, powder flying up behind it, low winter sun, tracking shot from the side."
TURN = "The girl in the pink dress lifts her arms and turns around on the green hill while clouds drift by and the camera moves slowly closer."
BREEZE = "A girl in a pink dress stands on a green hill in the wind, her hair and her dress move, clouds drift by, the camera moves slowly closer."
EXACT_TEXT = "The prompt's tokens always stay exact, in both directions."
SEED = 42
BLUE, GREEN, PURPLE, GOLD = "#3f789e", "#3f7a50", "#7a4f9e", "#8a7a3a"


def load_wan(g: Graph, model: files.ModelFile, vae: files.ModelFile = files.WAN21_VAE) -> tuple:
    """-> the model's node, the text encoder's and the VAE's"""
    g.column(430)
    g.group("1  Load", BLUE)
    return g.add("UNETLoader", unet_name=model, weight_dtype="default"), *load_wan_rest(g, vae)


def load_wan_rest(g: Graph, vae: files.ModelFile) -> tuple:
    clip = g.add("CLIPLoader", clip_name=files.UMT5, type="wan", device="default")
    return clip, g.add("VAELoader", vae_name=vae)


def load_experts(g: Graph, experts: tuple, loras: tuple) -> list[Node]:
    """Wan 2.2's two models, each followed by its LoRA if there are any."""
    g.column(520 if loras else 480)
    g.group("1  Load", BLUE)
    models = []
    for noise, expert, lora in zip(("High", "Low"), experts, loras or (None, None), strict=True):
        model = g.add("UNETLoader", f"{noise} noise expert", unet_name=expert, weight_dtype="default")
        if lora:
            title = f"{noise} noise expert: 4 steps"
            model = g.add("LoraLoaderModelOnly", title, model=model["MODEL"], lora_name=lora, strength_model=1.0)
        models.append(model)
    return models


def file_note(g: Graph) -> None:
    """Ends the column of the loaders: after the last of them, so that it knows all files."""
    g.group("Files", GOLD)
    note(g, "Files to download", notes.files(g.files()))


def note(g: Graph, title: str, text: str) -> None:
    g.note(title, text, notes.height(text, g.width))


def svg2_note(g: Graph, after: str = "the loader, LoRAs and the shift") -> None:
    g.group("About SVG2", GOLD)
    note(g, "About SVG2", notes.svg2(after))


def steps_note(g: Graph, count: str) -> None:
    g.group(f"About {count} steps", GOLD)
    note(g, f"{count.capitalize()} steps", notes.few_steps(count))


def size_note(g: Graph, *size, **more) -> None:
    g.group("About the size", GOLD)
    models = [file.name for file in g.files() if file.directory == "diffusion_models"]
    half = not any(dtype in name for name in models for dtype in ("fp8", "int8"))
    note(g, "Size and memory", notes.size(*size, half=half, **more))


def prompts(g: Graph, clip: Node, *texts: str) -> tuple:
    """-> the conditioning of the positive prompt, and of the negative one if there is one."""
    g.column(400)
    g.group("2  Describe", GREEN)
    named = zip(("Positive prompt", "Negative prompt"), texts, strict=False)
    nodes = [g.add("CLIPTextEncode", title, tall=150, clip=clip["CLIP"], text=text) for title, text in named]
    return tuple(node["CONDITIONING"] for node in nodes)


def start_image(g: Graph, title: str = "Start image", **more) -> Node:
    """ComfyUI's own example picture: every installation has it."""
    return g.add("LoadImage", title, tall=314, image="example.png", **more)


def svg2(g: Graph, model: Node, shift: float | None, expert: str = "", number: int = 3) -> tuple:
    """ModelSamplingSD3 if the model takes a shift, then SVG2, last before the sampler. -> (shift or model, SVG2)"""
    g.column(340)
    g.group(f"{number}  SVG2{expert}", PURPLE)
    if shift is not None:
        model = g.add("ModelSamplingSD3", model=model["MODEL"], shift=shift)
    patched = g.add("SVG2SparseAttention", f"SVG2{expert}" if expert else None, model=model["MODEL"])
    g.room(190)
    return model, patched


def k_sampler(g: Graph, model: Node, conditioning: tuple, latent, title=None, seed=SEED, **settings) -> Node:
    return g.add(
        "KSampler", title, model=model["MODEL"], positive=conditioning[0], negative=conditioning[1],
        latent_image=latent, seed=seed, denoise=1.0, **settings,
    )  # fmt: skip


def custom_sampler(
    g: Graph, shifted: Node, guider: Node, latent: Node, sampler: str = "euler", steps: int = 20
) -> Node:
    """The sampler in parts, as HunyuanVideo's templates have it. The sigmas follow the model's own shift."""
    noise = g.add("RandomNoise", noise_seed=SEED)
    kind = g.add("KSamplerSelect", sampler_name=sampler)
    sigmas = g.add("BasicScheduler", model=shifted["MODEL"], scheduler="simple", steps=steps, denoise=1.0)
    return g.add(
        "SamplerCustomAdvanced", noise=noise["NOISE"], guider=guider["GUIDER"], sampler=kind["SAMPLER"],
        sigmas=sigmas["SIGMAS"], latent_image=latent["LATENT"],
    )  # fmt: skip


def save(g: Graph, frames: Node, fps, name: str, title: str | None = None, **audio) -> None:
    """fps: a number or an output; audio: an output, if there is sound."""
    fps = fps if isinstance(fps, Output) else float(fps)
    video = g.add("CreateVideo", images=frames["IMAGE"], fps=fps, bit_depth=8, **audio)
    g.add("SaveVideo", title, video=video["VIDEO"], filename_prefix=name, format="auto", codec="auto")
    g.room(250)


def report(g: Graph, patched: Node, samples, frames: Node, title: str | None = None, tall: int = 560) -> None:
    g.add("SVG2Report", title, tall=tall, stats=patched["stats"], samples=samples, images=frames["IMAGE"])
    g.room(140)


def finish(
    g: Graph, patched: Node, sampler: Node, vae: Node, fps: int, samples: str = "LATENT", tiles=None, sound=None
) -> Graph:
    """Decode, save, report: the last nodes of a graph with one sampler. sound: the node of the audio VAE, if there is one."""
    if tiles:
        names = ("tile_size", "overlap", "temporal_size", "temporal_overlap")
        tiles = dict(zip(names, tiles, strict=True))
        frames = g.add("VAEDecodeTiled", samples=sampler[samples], vae=vae["VAE"], **tiles)
    else:
        frames = g.add("VAEDecode", samples=sampler[samples], vae=vae["VAE"])
    heard = {}
    if sound:
        heard["audio"] = g.add("VAEDecodeAudio", samples=sampler[samples], vae=sound["VAE"])["AUDIO"]
    in_parts = sampler.type == "SamplerCustomAdvanced"  # which fills its column
    if in_parts:
        g.column(440)
    g.group("5  Save", BLUE)
    save(g, frames, fps, f"video/svg2_{g.name}", **heard)
    if not in_parts:
        g.column(440)
    g.group("6  What ran sparse", PURPLE)
    report(g, patched, sampler[samples], frames, tall=380 if in_parts else 560)
    return g
