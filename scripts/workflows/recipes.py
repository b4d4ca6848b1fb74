"""One function per workflow. Sizes, steps, guidance, shift and samplers are those of the host's own templates."""

from . import files, notes, recipes_with_sound
from .graph import Graph
from .pieces import (
    BLUE,
    BREEZE,
    EXACT_TEXT,
    FOX,
    GOLD,
    GREEN,
    HARBOUR,
    MARKET,
    PURPLE,
    SEED,
    TURN,
    WAN_NEGATIVE,
    custom_sampler,
    file_note,
    finish,
    k_sampler,
    load_experts,
    load_wan,
    load_wan_rest,
    note,
    prompts,
    report,
    save,
    size_note,
    start_image,
    steps_note,
    svg2,
    svg2_note,
)

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
    size_note(g, 1280, 720, 81, 16, more=notes.START_IMAGE)
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
        size_note(g, 640, 640, 81, 16, more=notes.START_IMAGE)
    else:
        latent = g.add("EmptyHunyuanLatentVideo", "Size", **size)["LATENT"]
        size_note(g, 640, 640, 81, 16)

    _, high = svg2(g, models[0], 5.0, ", high noise")
    g.group("About SVG2", GOLD)
    note(g, "Two experts, two SVG2 nodes", notes.EXPERTS)
    _, low = svg2(g, models[1], 5.0, ", low noise")
    if loras:
        steps_note(g, "four")

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


# The example of ComfyUI's tutorial. No installation has a video of its own.
DRIVING_VIDEO = "video_wan2_2_14B_animate_original_video.mp4"
TUTORIAL = "https://docs.comfy.org/tutorials/video/wan/wan2-2-animate"
DANCE = "The girl in the pink dress dances on the green hill."


def wan22_animate_14b(g: Graph) -> Graph:
    """Pose transfer. The pose is drawn by the host's own nodes, where the template has other packs'."""
    g.column(520)
    g.group("1  Load", BLUE)
    model = g.add("UNETLoader", unet_name=files.WAN22_ANIMATE, weight_dtype="default")
    for title, lora in (("Few steps", files.WAN_DISTILLED), ("Relight", files.WAN22_RELIGHT)):
        model = g.add("LoraLoaderModelOnly", title, model=model["MODEL"], lora_name=lora, strength_model=1.0)
    clip, vae = load_wan_rest(g, files.WAN22_14B_VAE)
    vision = g.add("CLIPVisionLoader", clip_name=files.CLIP_VISION_H)
    pose_model = g.add("CheckpointLoaderSimple", "Pose model", ckpt_name=files.SDPOSE)
    file_note(g)

    given = prompts(g, clip, DANCE, WAN_NEGATIVE)
    image = start_image(g, "Character")
    seen = g.add("CLIPVisionEncode", clip_vision=vision["CLIP_VISION"], image=image["IMAGE"], crop="none")
    # One frame more for the character, in the latent.
    size_note(g, 640, 640, 77, None, frames=lambda length: notes.by_four(length) + 1, more=notes.UNTRIED)

    g.column(340)
    g.group("3  Driving video", GREEN)
    driving = g.add("LoadVideo", "Driving video", tall=314, file=DRIVING_VIDEO)
    parts = g.add("GetVideoComponents", video=driving["VIDEO"])
    scaled = g.add("ImageScale", image=parts["images"], upscale_method="lanczos", width=640, height=640, crop="center")
    pose = g.add("SDPoseKeypointExtractor", model=pose_model["MODEL"], vae=pose_model["VAE"], image=scaled["IMAGE"])
    drawn = g.add(
        "SDPoseDrawKeypoints", keypoints=pose["keypoints"], draw_body=True, draw_hands=True, draw_face=False, draw_feet=False,
        stick_width=4, face_point_size=2, score_threshold=0.5,
    )  # fmt: skip
    boxes = g.add("SDPoseFaceBBoxes", keypoints=pose["keypoints"])
    face = g.add("CropByBBoxes", image=scaled["IMAGE"], bboxes=boxes["bboxes"], output_width=512, output_height=512)
    g.group("About the inputs", GOLD)
    note(g, "Character and driving video", notes.animate(TUTORIAL))

    _, patched = svg2(g, model, 8.0, number=4)
    svg2_note(g)
    steps_note(g, "six")

    g.column(400)
    g.group("5  Sample", GREEN)
    start = g.add(
        "WanAnimateToVideo", "Size", positive=given[0], negative=given[1], vae=vae["VAE"], width=640, height=640,
        length=77, batch_size=1, clip_vision_output=seen["CLIP_VISION_OUTPUT"], reference_image=image["IMAGE"],
        face_video=face["IMAGE"], pose_video=drawn["IMAGE"],
    )  # fmt: skip
    steps = {"steps": 6, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    sampler = k_sampler(g, patched, (start["positive"], start["negative"]), start["latent"], **steps)
    # The latent begins with the character's image, which is none of the video's frames.
    trimmed = g.add("TrimVideoLatent", samples=sampler["LATENT"], trim_amount=start["trim_latent"])
    frames = g.add("VAEDecode", samples=trimmed["LATENT"], vae=vae["VAE"])

    g.column(440)
    g.group("6  Save", BLUE)
    save(g, frames, parts["fps"], f"video/svg2_{g.name}", audio=parts["audio"])
    g.group("7  What ran sparse", PURPLE)
    report(g, patched, sampler["LATENT"], frames, tall=380)
    return g


# --- HunyuanVideo ---


def _load_hunyuan(g: Graph, model: files.ModelFile, encoders: tuple, kind: str, vae: files.ModelFile) -> tuple:
    g.column(430)
    g.group("1  Load", BLUE)
    loader = g.add("UNETLoader", unet_name=model, weight_dtype="default")
    clip = g.add("DualCLIPLoader", clip_name1=encoders[0], clip_name2=encoders[1], type=kind, device="default")
    decoder = g.add("VAELoader", vae_name=vae)
    file_note(g)
    return loader, clip, decoder


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
    sampler = custom_sampler(g, shifted, guider, latent)
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
    sampler = custom_sampler(g, shifted, guider, latent)
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
    more = f"This model is particular about size and length: keep 848 x 480 and 93 frames. {notes.START_IMAGE}"
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
    "wan2.2_animate_14B": wan22_animate_14b,
    "hunyuan_video_t2v": hunyuan_video_t2v,
    "hunyuan_video_1.5_t2v": hunyuan_video_1_5_t2v,
    "cosmos_predict2_video2world": cosmos_predict2_video2world,
    "minimax_h3_t2v": recipes_with_sound.minimax_h3_t2v,
    "minimax_h3_i2v": recipes_with_sound.minimax_h3_i2v,
    "minimax_h3_i2v_turbo": recipes_with_sound.minimax_h3_i2v_turbo,
    "ltx2.3_i2v": recipes_with_sound.ltx23_i2v,
    "ltx2.5_i2v": recipes_with_sound.ltx25_i2v,
    "compare_dense_and_svg2": compare_dense_and_svg2,
}


def build(name: str, object_info: dict) -> Graph:
    """The graph of one workflow."""
    return RECIPES[name](Graph(name, object_info))
