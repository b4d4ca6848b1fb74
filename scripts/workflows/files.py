"""The model files that the workflows load: names, places and addresses as the host's own templates give them.

Source: the templates that ComfyUI 0.30.0 pins (comfyui-workflow-templates 0.11.27). Not in that release are
Wan 2.1's 720p image-to-video model, which lies beside the 480p one in the same repository; Cosmos-Predict2 and Wan 2.2
Animate, whose templates earlier releases had (Animate: comfyui-workflow-templates-media-video 0.3.12); MiniMax-H3's Turbo
LoRA and LTX-2.5, which came later (comfyui-workflow-templates-json 0.1.123).
"""

from dataclasses import dataclass
from posixpath import basename

HUB = "https://huggingface.co"
WAN21 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
HUNYUAN = f"{HUB}/Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files"
HUNYUAN15 = f"{HUB}/Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
KIJAI = f"{HUB}/Kijai/WanVideo_comfy/resolve/main"
MINIMAX = f"{HUB}/Comfy-Org/MiniMax-H3/resolve/main"
LTX25 = f"{HUB}/Lightricks/LTX-2.5/resolve/main"


@dataclass(frozen=True)
class ModelFile:
    """url: where it is downloaded from; directory: the folder under models/ that it goes into."""

    url: str
    directory: str

    @property
    def name(self) -> str:
        return basename(self.url)

    def entry(self) -> dict:
        """As loader nodes carry it, for the editor's dialog of missing models."""
        return {"name": self.name, "url": self.url, "directory": self.directory}


def _in(folder: str, name: str, directory: str | None = None) -> ModelFile:
    """A file of one of the repackaged repositories, whose folders are named like ComfyUI's."""
    return ModelFile(f"{folder}/{name}", directory or folder.rpartition("/")[2])


UMT5 = _in(f"{WAN21}/text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
CLIP_VISION_H = _in(f"{WAN21}/clip_vision", "clip_vision_h.safetensors")
WAN21_VAE = _in(f"{WAN21}/vae", "wan_2.1_vae.safetensors")
WAN21_T2V_1_3B = _in(f"{WAN21}/diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors")
WAN21_T2V_14B = _in(f"{WAN21}/diffusion_models", "wan2.1_t2v_14B_fp8_scaled.safetensors")
WAN21_I2V_720P = _in(f"{WAN21}/diffusion_models", "wan2.1_i2v_720p_14B_fp8_scaled.safetensors")

WAN22_VAE = _in(f"{WAN22}/vae", "wan2.2_vae.safetensors")
WAN22_14B_VAE = _in(f"{WAN22}/vae", "wan_2.1_vae.safetensors")
WAN22_TI2V_5B = _in(f"{WAN22}/diffusion_models", "wan2.2_ti2v_5B_fp16.safetensors")
# Of the two experts, high noise first.
WAN22_T2V = (
    _in(f"{WAN22}/diffusion_models", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"),
    _in(f"{WAN22}/diffusion_models", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"),
)
WAN22_I2V = (
    _in(f"{WAN22}/diffusion_models", "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors"),
    _in(f"{WAN22}/diffusion_models", "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors"),
)
WAN22_T2V_4STEPS = (
    _in(f"{WAN22}/loras", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors"),
    _in(f"{WAN22}/loras", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors"),
)

WAN22_ANIMATE = _in(
    f"{HUB}/Kijai/WanVideo_comfy_fp8_scaled/resolve/main/Wan22Animate",
    "Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors",
    "diffusion_models",
)
WAN_DISTILLED = _in(f"{KIJAI}/Lightx2v", "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors", "loras")
WAN22_RELIGHT = _in(f"{KIJAI}/LoRAs/Wan22_relight", "WanAnimate_relight_lora_fp16.safetensors", "loras")
SDPOSE = _in(f"{HUB}/Comfy-Org/SDPose/resolve/main/checkpoints", "sdpose_wholebody_fp16.safetensors")

CLIP_L = _in(f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main", "clip_l.safetensors", "text_encoders")
LLAVA = _in(f"{HUNYUAN}/text_encoders", "llava_llama3_fp8_scaled.safetensors")
HUNYUAN_T2V = _in(f"{HUNYUAN}/diffusion_models", "hunyuan_video_t2v_720p_bf16.safetensors")
HUNYUAN_VAE = _in(f"{HUNYUAN}/vae", "hunyuan_video_vae_bf16.safetensors")

QWEN = _in(f"{HUNYUAN15}/text_encoders", "qwen_2.5_vl_7b_fp8_scaled.safetensors")
BYT5 = _in(f"{HUNYUAN15}/text_encoders", "byt5_small_glyphxl_fp16.safetensors")
HUNYUAN15_T2V = _in(f"{HUNYUAN15}/diffusion_models", "hunyuanvideo1.5_720p_t2v_fp16.safetensors")
HUNYUAN15_VAE = _in(f"{HUNYUAN15}/vae", "hunyuanvideo15_vae_fp16.safetensors")

OLD_T5 = _in(
    f"{HUB}/comfyanonymous/cosmos_1.0_text_encoder_and_VAE_ComfyUI/resolve/main/text_encoders",
    "oldt5_xxl_fp8_e4m3fn_scaled.safetensors",
)
COSMOS_PREDICT2_V2W = _in(
    f"{HUB}/Comfy-Org/Cosmos_Predict2_repackaged/resolve/main",
    "cosmos_predict2_2B_video2world_480p_16fps.safetensors",
    "diffusion_models",
)

QWEN3_VL = _in(f"{MINIMAX}/text_encoders", "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors")
MINIMAX_H3 = _in(f"{MINIMAX}/diffusion_models", "minimax_h3_fl2va_pruned_int8_convrot.safetensors")
MINIMAX_VIDEO_VAE = _in(f"{MINIMAX}/vae", "minimax_h3_video_vae_fp16.safetensors")
MINIMAX_AUDIO_VAE = _in(f"{MINIMAX}/vae", "minimax_h3_audio_vae_fp32.safetensors")
MINIMAX_TURBO = _in(
    f"{HUB}/lightx2v/Minimax-h3-Turbo/resolve/main",
    "minimax_h3_fl2v_turbo_8step_v1.0_comfyui_bf16.safetensors",
    "loras",
)

LTX23_CHECKPOINT = _in(f"{HUB}/Lightricks/LTX-2.3-fp8/resolve/main", "ltx-2.3-22b-dev-fp8.safetensors", "checkpoints")
LTX23_DISTILLED = _in(
    f"{HUB}/Comfy-Org/ltx-2.3/resolve/main/split_files/loras",
    "ltx_2.3_22b_distilled_1.1_lora_dynamic_fro09_avg_rank_111_bf16.safetensors",
)
LTX23_UPSCALER = _in(
    f"{HUB}/Lightricks/LTX-2.3/resolve/main",
    "ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
    "latent_upscale_models",
)
GEMMA3 = _in(f"{HUB}/Comfy-Org/ltx-2/resolve/main/split_files/text_encoders", "gemma_3_12B_it_fp4_mixed.safetensors")
LTX25_MODEL = _in(f"{LTX25}/diffusion_models", "ltx-2.5-22b-distilled-transformer-comfy-int8-convrot.safetensors")
LTX25_VIDEO_VAE = _in(f"{LTX25}/vae", "ltx-2.5-video-vae-bf16.safetensors")
LTX25_AUDIO_VAE = _in(f"{LTX25}/vae", "ltx-2.5-audio-vae-bf16.safetensors")
LTX25_UPSCALER = _in(f"{LTX25}/latent_upscale_models", "ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0.safetensors")
GEMMA4 = _in(f"{LTX25}/text_encoders", "gemma4-12b-with-proj-ltx-2.5-comfy-int8-convrot.safetensors")
