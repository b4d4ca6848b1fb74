"""The models that make a sound track with the video, MiniMax-H3 and LTX-2; otherwise as recipes.py."""

from . import files, notes
from .graph import Graph, Node, Output
from .pieces import (
    BLUE,
    FOX,
    GOLD,
    GREEN,
    PURPLE,
    SEED,
    TURN,
    custom_sampler,
    file_note,
    finish,
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

FOX_HEARD = f"{FOX} Audio: paws in the snow, quick breath, wind in the trees."
TURN_HEARD = f"{TURN} Audio: a light breeze, birds far away, the rustle of her dress."

# The least host for a model that came after the pinned one. The nodes must all be in that one, which checks the graph.
NEEDS = {"ltx2.5_i2v": "0.32"}

# --- MiniMax-H3 ---


def _minimax_h3(g: Graph, prompt: str, width: int, height: int, from_image: bool = True, turbo: bool = False) -> Graph:
    g.column(520)
    g.group("1  Load", BLUE)
    loader = g.add("UNETLoader", unet_name=files.MINIMAX_H3, weight_dtype="default")
    if turbo:
        loader = g.add(
            "LoraLoaderModelOnly", "Turbo: 8 steps", model=loader["MODEL"], lora_name=files.MINIMAX_TURBO,
            strength_model=1.0,
        )  # fmt: skip
    clip = g.add("CLIPLoader", clip_name=files.QWEN3_VL, type="minimax", device="default")
    vae = g.add("VAELoader", "Video VAE", vae_name=files.MINIMAX_VIDEO_VAE)
    sound = g.add("VAELoader", "Audio VAE", vae_name=files.MINIMAX_AUDIO_VAE)
    file_note(g)

    g.column(400)
    g.group("2  Describe", GREEN)
    first = {"first_frame": start_image(g)["IMAGE"]} if from_image else {}
    start = g.add(
        "MiniMaxH3ImageToVideo", "Prompt and size", tall=360, clip=clip["CLIP"], vae=vae["VAE"], prompt=prompt,
        width=width, height=height, length=124, **first,
    )  # fmt: skip
    more = notes.minimax(from_image)
    size_note(g, width, height, 124, 24, spatial=32, frames=notes.five_of_17, more=more, tiled=False)

    _, patched = svg2(g, loader, None)
    svg2_note(g, "the loader and LoRAs")
    if turbo:
        steps_note(g, "eight")
    g.column(360)
    g.group("4  Sample", GREEN)
    guider = g.add("BasicGuider", model=patched["MODEL"], conditioning=start["positive"])
    sampler = custom_sampler(g, loader, guider, start, "res_multistep", steps=8 if turbo else 20)
    return finish(g, patched, sampler, vae, 24, samples="output", sound=sound)


def minimax_h3_t2v(g: Graph) -> Graph:
    return _minimax_h3(g, FOX_HEARD, 864, 480, from_image=False)


def minimax_h3_i2v(g: Graph) -> Graph:
    return _minimax_h3(g, TURN_HEARD, 640, 640)


def minimax_h3_i2v_turbo(g: Graph) -> Graph:
    return _minimax_h3(g, TURN_HEARD, 640, 640, turbo=True)


# --- LTX-2 ---

FIRST_SIGMAS = "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0"
LAST_SIGMAS = "0.85, 0.725, 0.4219, 0.0"


def _stage(g: Graph, name: str, latent: Output, strength: float, sigmas: str, seed: int, given: dict) -> Node:
    """The start image goes into the video's latent, the sound to it, and both are sampled together."""
    g.group(name, GREEN)
    video = g.add("LTXVImgToVideoInplace", latent=latent, strength=strength, vae=given["vae"], image=given["image"])
    both = g.add(
        "LTXVConcatAVLatent", "Join video and sound", video_latent=video["latent"], audio_latent=given["audio"]
    )
    noise = g.add("RandomNoise", noise_seed=seed)
    steps = g.add("ManualSigmas", sigmas=sigmas)
    return g.add(
        "SamplerCustomAdvanced", noise=noise["NOISE"], guider=given["guider"], sampler=given["sampler"],
        sigmas=steps["SIGMAS"], latent_image=both["latent"],
    )  # fmt: skip


def _ltx2(g: Graph, loader: Node, loaded: dict, prompt: str, fps: int, sampler: str, tiles: tuple) -> Graph:
    """Two stages: a video of half the size in eight steps, then three more at twice its width and height.

    loaded: what the graph's own loaders give: clip, vae, sound (the audio's VAE), upscaler.
    """
    file_note(g)
    positive, negative = prompts(g, loaded["clip"], prompt, "")
    image = start_image(g)
    g.group("About the size", GOLD)
    note(g, "Size and memory", notes.two_stages(1280, 704, 121, fps))
    _, patched = svg2(g, loader, None)
    svg2_note(g, "the loader and LoRAs")

    g.column(340)
    g.group("4  For both stages", GREEN)
    frames = g.add("PrimitiveInt", "Frames", value=121)["INT"]
    # The template scales the image further up, and its later nodes down again.
    image = g.add(
        "ImageScale", "Start image, whole size", image=image["IMAGE"], upscale_method="lanczos", width=1280, height=704,
        crop="center",
    )  # fmt: skip
    image = g.add("LTXVPreprocess", image=image["IMAGE"], img_compression=18)
    half = g.add("EmptyLTXVLatentVideo", "Half the size", width=640, height=352, length=frames, batch_size=1)
    silence = g.add(
        "LTXVEmptyLatentAudio", frames_number=frames, frame_rate=float(fps), batch_size=1, audio_vae=loaded["sound"]
    )
    rate = g.add("LTXVConditioning", positive=positive, negative=negative, frame_rate=float(fps))
    guider = g.add("CFGGuider", model=patched["MODEL"], positive=rate["positive"], negative=rate["negative"], cfg=1.0)
    kind = g.add("KSamplerSelect", sampler_name=sampler)
    given = {"vae": loaded["vae"], "image": image["output_image"], "audio": silence["Latent"]}
    given.update(guider=guider["GUIDER"], sampler=kind["SAMPLER"])

    g.column(360)
    first = _stage(g, "5  First stage", half["LATENT"], 0.7, FIRST_SIGMAS, SEED, given)
    apart = g.add("LTXVSeparateAVLatent", "Split video and sound", av_latent=first["output"])
    doubled = g.add(
        "LTXVLatentUpsampler", samples=apart["video_latent"], upscale_model=loaded["upscaler"], vae=loaded["vae"]
    )
    given["audio"] = apart["audio_latent"]
    last = _stage(g, "6  Last stage", doubled["LATENT"], 1.0, LAST_SIGMAS, SEED + 1, given)
    apart = g.add("LTXVSeparateAVLatent", "Split video and sound", av_latent=last["output"])

    g.column(440)
    g.group("7  Save", BLUE)
    names = ("tile_size", "overlap", "temporal_size", "temporal_overlap")
    tiled = dict(zip(names, tiles, strict=True))
    video = g.add("VAEDecodeTiled", samples=apart["video_latent"], vae=loaded["vae"], **tiled)
    heard = g.add("LTXVAudioVAEDecode", samples=apart["audio_latent"], audio_vae=loaded["sound"])
    save(g, video, fps, f"video/svg2_{g.name}", audio=heard["Audio"])
    g.group("8  What ran sparse", PURPLE)
    report(g, patched, last["output"], video, tall=380)
    return g


def ltx23_i2v(g: Graph) -> Graph:
    g.column(560)
    g.group("1  Load", BLUE)
    checkpoint = g.add("CheckpointLoaderSimple", ckpt_name=files.LTX23_CHECKPOINT)
    model = g.add(
        "LoraLoaderModelOnly", "Few steps", model=checkpoint["MODEL"], lora_name=files.LTX23_DISTILLED,
        strength_model=0.5,
    )  # fmt: skip
    clip = g.add(
        "LTXAVTextEncoderLoader", text_encoder=files.GEMMA3, ckpt_name=files.LTX23_CHECKPOINT, device="default"
    )
    sound = g.add("LTXVAudioVAELoader", ckpt_name=files.LTX23_CHECKPOINT)
    upscaler = g.add("LatentUpscaleModelLoader", model_name=files.LTX23_UPSCALER)
    loaded = {"clip": clip, "vae": checkpoint["VAE"], "sound": sound["Audio VAE"]}
    loaded["upscaler"] = upscaler["LATENT_UPSCALE_MODEL"]
    return _ltx2(g, model, loaded, TURN_HEARD, 25, "euler", (768, 64, 4096, 4))


def ltx25_i2v(g: Graph) -> Graph:
    """The template has a guider with two CFG scales; where both are 1, it is the same as the one here."""
    g.column(540)
    g.group("1  Load", BLUE)
    model = g.add("UNETLoader", unet_name=files.LTX25_MODEL, weight_dtype="default")
    clip = g.add("CLIPLoader", clip_name=files.GEMMA4, type="ltxv", device="default")
    vae = g.add("VAELoader", "Video VAE", vae_name=files.LTX25_VIDEO_VAE)
    sound = g.add("VAELoader", "Audio VAE", vae_name=files.LTX25_AUDIO_VAE)
    upscaler = g.add("LatentUpscaleModelLoader", model_name=files.LTX25_UPSCALER)
    g.group("Before you download", GOLD)
    note(g, "What it needs", notes.ltx25(NEEDS[g.name]))
    loaded = {"clip": clip, "vae": vae["VAE"], "sound": sound["VAE"], "upscaler": upscaler["LATENT_UPSCALE_MODEL"]}
    return _ltx2(g, model, loaded, TURN_HEARD, 24, "euler_ancestral", (512, 64, 64, 16))
