"""One function per workflow. Sizes, steps, guidance, shift and samplers are those of the host's own templates."""

# ruff: noqa: RUF001  (Chinese commas)
from . import files, notes
from .graph import Graph, Node

WAN_NEGATIVE = (  # Wan's own, which its authors recommend for all its models
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
HARBOUR = "A small red fishing boat leaves a harbour at dawn, mist over calm water, gulls circling, the camera follows at a distance, soft golden light, cinematic."
MARKET = "A busy night market in the rain, lanterns reflected in puddles, people with umbrellas pass by, steam rises from food stalls, the camera glides slowly forward."
FOX = "A fox runs through deep snow between pine trees, powder flying up behind it, low winter sun, tracking shot from the side."
TURN = "The girl in the pink dress lifts her arms and turns around on the green hill while clouds drift by and the camera moves slowly closer."
BREEZE = "A girl in a pink dress stands on a green hill in the wind, her hair and her dress move, clouds drift by, the camera moves slowly closer."
START_IMAGE = "Choose a start image of your own: the example only shows that it works."
EXACT_TEXT = "The prompt's tokens always stay exact, in both directions."
SEED = 42
BLUE, GREEN, PURPLE, GOLD = "#3f789e", "#3f7a50", "#7a4f9e", "#8a7a3a"


# --- pieces ---


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


def size_note(g: Graph, *size, **more) -> None:
    g.group("About the size", GOLD)
    models = [file.name for file in g.files() if file.directory == "diffusion_models"]
    half = not any("fp8" in name for name in models)
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


def svg2(g: Graph, model: Node, shift: float | None, expert: str = "") -> tuple:
    """ModelSamplingSD3 if the model takes a shift, then SVG2, last before the sampler. -> (shift or model, SVG2)"""
    g.column(340)
    g.group(f"3  SVG2{expert}", PURPLE)
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


def save(g: Graph, frames: Node, fps: int, name: str, title: str | None = None) -> None:
    video = g.add("CreateVideo", images=frames["IMAGE"], fps=float(fps), bit_depth=8)
    g.add("SaveVideo", title, video=video["VIDEO"], filename_prefix=name, format="auto", codec="auto")
    g.room(250)


def report(g: Graph, patched: Node, samples, frames: Node, title: str | None = None, tall: int = 560) -> None:
    g.add("SVG2Report", title, tall=tall, stats=patched["stats"], samples=samples, images=frames["IMAGE"])
    g.room(140)


def finish(g: Graph, patched: Node, sampler: Node, vae: Node, fps: int, samples: str = "LATENT", tiles=None) -> Graph:
    """Decode, save, report: the last nodes of a graph with one sampler."""
    if tiles:
        names = ("tile_size", "overlap", "temporal_size", "temporal_overlap")
        tiles = dict(zip(names, tiles, strict=True))
        frames = g.add("VAEDecodeTiled", samples=sampler[samples], vae=vae["VAE"], **tiles)
    else:
        frames = g.add("VAEDecode", samples=sampler[samples], vae=vae["VAE"])
    in_parts = sampler.type == "SamplerCustomAdvanced"  # which fills its column
    if in_parts:
        g.column(440)
    g.group("5  Save", BLUE)
    save(g, frames, fps, f"video/svg2_{g.name}")
    if not in_parts:
        g.column(440)
    g.group("6  What ran sparse", PURPLE)
    report(g, patched, sampler[samples], frames, tall=380 if in_parts else 560)
    return g


# --- Wan 2.1 ---


def _wan21_t2v(g: Graph, model: files.ModelFile, length: int, more: str) -> Graph:
    loader, clip, vae = load_wan(g, model)
    file_note(g)
    given = prompts(g, clip, FOX, WAN_NEGATIVE)
    latent = g.add("EmptyHunyuanLatentVideo", "Size", width=832, height=480, length=length, batch_size=1)
    size_note(g, 832, 480, length, 16, more=more)
    _, patched = svg2(g, loader, 8.0)
    svg2_note(g)
    g.column(360)
    g.group("4  Sample", GREEN)
    steps = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}
    sampler = k_sampler(g, patched, given, latent["LATENT"], **steps)
    return finish(g, patched, sampler, vae, 16)


def wan21_t2v_1_3b(g: Graph) -> Graph:
    return _wan21_t2v(g, files.WAN21_T2V_1_3B, 33, "The model was made for 81 frames: 32,760 tokens.")


def wan21_t2v_14b(g: Graph) -> Graph:
    return _wan21_t2v(g, files.WAN21_T2V_14B, 81, "The same model also makes 1280 x 720: 75,600 tokens.")


def wan21_i2v_14b_720p(g: Graph) -> Graph:
    loader, clip, vae = load_wan(g, files.WAN21_I2V_720P)
    vision = g.add("CLIPVisionLoader", clip_name=files.CLIP_VISION_H)
    file_note(g)
    positive, negative = prompts(g, clip, TURN, WAN_NEGATIVE)
    image = start_image(g)
    seen = g.add("CLIPVisionEncode", clip_vision=vision["CLIP_VISION"], image=image["IMAGE"], crop="none")
    size_note(g, 1280, 720, 81, 16, more=START_IMAGE)
    _, patched = svg2(g, loader, 8.0)
    svg2_note(g)
    g.column(360)
    g.group("4  Sample", GREEN)
    start = g.add(
        "WanImageToVideo", "Size", positive=positive, negative=negative, vae=vae["VAE"], width=1280, height=720,
        length=81, batch_size=1, clip_vision_output=seen["CLIP_VISION_OUTPUT"], start_image=image["IMAGE"],
    )  # fmt: skip
    steps = {"steps": 20, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}
    sampler = k_sampler(g, patched, (start["positive"], start["negative"]), start["latent"], **steps)
    return finish(g, patched, sampler, vae, 16)


# --- Wan 2.2 ---


def wan22_ti2v_5b(g: Graph) -> Graph:
    loader, clip, vae = load_wan(g, files.WAN22_TI2V_5B, vae=files.WAN22_VAE)
    file_note(g)
    given = prompts(g, clip, MARKET, WAN_NEGATIVE)
    image = start_image(g, "Start image (Ctrl+B switches it on)", bypassed=True)
    more = "**From text or from an image.** The start image is bypassed: select its node and press Ctrl+B to begin from a picture."
    size_note(g, 1280, 704, 121, 24, spatial=32, more=more)
    _, patched = svg2(g, loader, 8.0)
    svg2_note(g)
    g.column(360)
    g.group("4  Sample", GREEN)
    latent = g.add(
        "Wan22ImageToVideoLatent", "Size", vae=vae["VAE"], start_image=image["IMAGE"], width=1280, height=704,
        length=121, batch_size=1,
    )  # fmt: skip
    steps = {"steps": 20, "cfg": 5.0, "sampler_name": "uni_pc", "scheduler": "simple"}
    sampler = k_sampler(g, patched, given, latent["LATENT"], **steps)
    return finish(g, patched, sampler, vae, 24)


def _wan22_14b(g: Graph, experts: tuple, steps: int, cfg: float, loras: tuple = (), from_image: bool = False) -> Graph:
    """Two experts, each with its own shift and SVG2 node; the second sampler continues the first one's latent."""
    models = load_experts(g, experts, loras)
    clip, vae = load_wan_rest(g, files.WAN22_14B_VAE)
    file_note(g)

    given = prompts(g, clip, TURN if from_image else HARBOUR, WAN_NEGATIVE)
    size = {"width": 640, "height": 640, "length": 81, "batch_size": 1}
    if from_image:
        image = start_image(g)
        size_note(g, 640, 640, 81, 16, more=START_IMAGE)
    else:
        latent = g.add("EmptyHunyuanLatentVideo", "Size", **size)["LATENT"]
        size_note(g, 640, 640, 81, 16)

    _, high = svg2(g, models[0], 5.0, ", high noise")
    g.group("About SVG2", GOLD)
    note(g, "Two experts, two SVG2 nodes", notes.EXPERTS)
    _, low = svg2(g, models[1], 5.0, ", low noise")
    if loras:
        g.group("About four steps", GOLD)
        note(g, "Four steps", notes.FOUR_STEPS)

    g.column(360)
    g.group("4  Sample", GREEN)
    if from_image:
        start = g.add(
            "WanImageToVideo", "Size", positive=given[0], negative=given[1], vae=vae["VAE"], start_image=image["IMAGE"],
            **size,
        )  # fmt: skip
        given, latent = (start["positive"], start["negative"]), start["latent"]
    all_steps = g.add("PrimitiveInt", "Steps in all", value=steps)["INT"]
    first = g.add("PrimitiveInt", "of these, high noise", value=steps // 2)["INT"]
    common = {"positive": given[0], "negative": given[1], "steps": all_steps, "cfg": cfg}
    common.update(sampler_name="euler", scheduler="simple")
    one = g.add(
        "KSamplerAdvanced", "First steps: high noise", model=high["MODEL"], latent_image=latent, add_noise="enable",
        noise_seed=SEED, start_at_step=0, end_at_step=first, return_with_leftover_noise="enable", **common,
    )  # fmt: skip
    two = g.add(
        "KSamplerAdvanced", "Remaining steps: low noise", model=low["MODEL"], latent_image=one["LATENT"],
        add_noise="disable", noise_seed=0, start_at_step=first, end_at_step=10000,
        return_with_leftover_noise="disable", **common,
    )  # fmt: skip

    g.column(440)
    g.group("5  Save", BLUE)
    frames = g.add("VAEDecode", samples=two["LATENT"], vae=vae["VAE"])
    save(g, frames, 16, f"video/svg2_{g.name}")
    g.group("6  What ran sparse", PURPLE)
    report(g, high, one["LATENT"], frames, "Report, high noise", tall=330)
    report(g, low, two["LATENT"], frames, "Report, low noise", tall=330)
    return g


def wan22_t2v_14b(g: Graph) -> Graph:
    return _wan22_14b(g, files.WAN22_T2V, steps=20, cfg=3.5)


def wan22_i2v_14b(g: Graph) -> Graph:
    return _wan22_14b(g, files.WAN22_I2V, steps=20, cfg=3.5, from_image=True)


def wan22_t2v_14b_4steps(g: Graph) -> Graph:
    return _wan22_14b(g, files.WAN22_T2V, steps=4, cfg=1.0, loras=files.WAN22_T2V_4STEPS)


# --- HunyuanVideo ---


def _load_hunyuan(g: Graph, model: files.ModelFile, encoders: tuple, kind: str, vae: files.ModelFile) -> tuple:
    g.column(430)
    g.group("1  Load", BLUE)
    loader = g.add("UNETLoader", unet_name=model, weight_dtype="default")
    clip = g.add("DualCLIPLoader", clip_name1=encoders[0], clip_name2=encoders[1], type=kind, device="default")
    decoder = g.add("VAELoader", vae_name=vae)
    file_note(g)
    return loader, clip, decoder


def _custom_sampler(g: Graph, shifted: Node, guider: Node, latent: Node) -> Node:
    """The sampler in parts, as HunyuanVideo's templates have it. The sigmas follow the model's own shift."""
    noise = g.add("RandomNoise", noise_seed=SEED)
    kind = g.add("KSamplerSelect", sampler_name="euler")
    sigmas = g.add("BasicScheduler", model=shifted["MODEL"], scheduler="simple", steps=20, denoise=1.0)
    return g.add(
        "SamplerCustomAdvanced", noise=noise["NOISE"], guider=guider["GUIDER"], sampler=kind["SAMPLER"],
        sigmas=sigmas["SIGMAS"], latent_image=latent["LATENT"],
    )  # fmt: skip


def hunyuan_video_t2v(g: Graph) -> Graph:
    encoders = files.CLIP_L, files.LLAVA
    loader, clip, vae = _load_hunyuan(g, files.HUNYUAN_T2V, encoders, "hunyuan_video", files.HUNYUAN_VAE)
    [positive] = prompts(g, clip, FOX)
    guidance = g.add("FluxGuidance", conditioning=positive, guidance=6.0)
    latent = g.add("EmptyHunyuanLatentVideo", "Size", width=848, height=480, length=73, batch_size=1)
    size_note(g, 848, 480, 73, 24, more=EXACT_TEXT)
    shifted, patched = svg2(g, loader, 7.0)
    svg2_note(g)
    g.column(360)
    g.group("4  Sample", GREEN)
    guider = g.add("BasicGuider", model=patched["MODEL"], conditioning=guidance["CONDITIONING"])
    sampler = _custom_sampler(g, shifted, guider, latent)
    return finish(g, patched, sampler, vae, 24, samples="output", tiles=(256, 64, 64, 8))


def hunyuan_video_1_5_t2v(g: Graph) -> Graph:
    encoders = files.QWEN, files.BYT5
    loader, clip, vae = _load_hunyuan(g, files.HUNYUAN15_T2V, encoders, "hunyuan_video_15", files.HUNYUAN15_VAE)
    positive, negative = prompts(g, clip, MARKET, "")
    latent = g.add("EmptyHunyuanVideo15Latent", "Size", width=1280, height=720, length=121, batch_size=1)
    size_note(g, 1280, 720, 121, 24, more=f"{EXACT_TEXT} The model's authors use 50 steps and a shift of 9.")
    shifted, patched = svg2(g, loader, 7.0)
    svg2_note(g)
    g.column(360)
    g.group("4  Sample", GREEN)
    guider = g.add("CFGGuider", model=patched["MODEL"], positive=positive, negative=negative, cfg=6.0)
    sampler = _custom_sampler(g, shifted, guider, latent)
    return finish(g, patched, sampler, vae, 24, samples="output")


# --- Cosmos ---


def cosmos_predict2_video2world(g: Graph) -> Graph:
    g.column(480)
    g.group("1  Load", BLUE)
    loader = g.add("UNETLoader", unet_name=files.COSMOS_PREDICT2_V2W, weight_dtype="default")
    clip = g.add("CLIPLoader", clip_name=files.OLD_T5, type="cosmos", device="default")
    vae = g.add("VAELoader", vae_name=files.WAN21_VAE)
    file_note(g)
    given = prompts(g, clip, BREEZE, "")
    image = start_image(g)
    more = f"This model is particular about size and length: keep 848 x 480 and 93 frames. {START_IMAGE}"
    size_note(g, 848, 480, 93, 16, more=more)
    _, patched = svg2(g, loader, None)
    svg2_note(g, "the loader and LoRAs")
    g.column(360)
    g.group("4  Sample", GREEN)
    latent = g.add(
        "CosmosPredict2ImageToVideoLatent", "Size", vae=vae["VAE"], start_image=image["IMAGE"], width=848, height=480,
        length=93, batch_size=1,
    )  # fmt: skip
    steps = {"steps": 35, "cfg": 4.0, "sampler_name": "euler", "scheduler": "karras"}
    sampler = k_sampler(g, patched, given, latent["LATENT"], **steps)
    return finish(g, patched, sampler, vae, 16)


# --- A against B ---


def compare_dense_and_svg2(g: Graph) -> Graph:
    loader, clip, vae = load_wan(g, files.WAN21_T2V_1_3B)
    file_note(g)
    size_note(g, 832, 480, 33, 16)
    given = prompts(g, clip, FOX, WAN_NEGATIVE)
    latent = g.add("EmptyHunyuanLatentVideo", "Size", width=832, height=480, length=33, batch_size=1)["LATENT"]
    seed = g.add("PrimitiveInt", "Seed of both", value=SEED)["INT"]
    g.group("About this comparison", GOLD)
    note(g, "A against B", notes.COMPARE)
    shifted, patched = svg2(g, loader, 8.0)
    svg2_note(g)

    g.column(340)
    steps = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple", "seed": seed}
    g.group("4  A: dense", BLUE)
    dense = k_sampler(g, shifted, given, latent, "A: dense", **steps)
    reference = g.add("VAEDecode", samples=dense["LATENT"], vae=vae["VAE"])
    g.group("4  B: SVG2", PURPLE)
    sparse = k_sampler(g, patched, given, latent, "B: SVG2", **steps)
    candidate = g.add("VAEDecode", samples=sparse["LATENT"], vae=vae["VAE"])

    g.column(340)
    g.group("5  Save A", BLUE)
    save(g, reference, 16, "video/svg2_compare_dense", "A: dense")
    g.group("5  Save B", PURPLE)
    save(g, candidate, 16, "video/svg2_compare_svg2", "B: SVG2")

    g.column(440)
    g.group("6  Compare", GREEN)
    g.add("SVG2Compare", tall=360, reference=reference["IMAGE"], candidate=candidate["IMAGE"])
    g.room(140)
    g.group("7  What ran sparse", PURPLE)
    report(g, patched, sparse["LATENT"], candidate, tall=330)
    return g


RECIPES = {
    "wan2.1_t2v_1.3B": wan21_t2v_1_3b,
    "wan2.1_t2v_14B": wan21_t2v_14b,
    "wan2.1_i2v_14B_720p": wan21_i2v_14b_720p,
    "wan2.2_ti2v_5B": wan22_ti2v_5b,
    "wan2.2_t2v_14B": wan22_t2v_14b,
    "wan2.2_i2v_14B": wan22_i2v_14b,
    "wan2.2_t2v_14B_4steps": wan22_t2v_14b_4steps,
    "hunyuan_video_t2v": hunyuan_video_t2v,
    "hunyuan_video_1.5_t2v": hunyuan_video_1_5_t2v,
    "cosmos_predict2_video2world": cosmos_predict2_video2world,
    "compare_dense_and_svg2": compare_dense_and_svg2,
}


def build(name: str, object_info: dict) -> Graph:
    """The graph of one workflow."""
    return RECIPES[name](Graph(name, object_info))
