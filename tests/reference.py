"""The reference: diffusers and transformers on PyTorch, in float32 on the CPU. Import only where they are installed."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKLQwenImage,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_img2img as img2img
from diffusers.utils import logging as diffusers_logging
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)


def shapes(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """The names and shapes of all tensors that the reference classes make of these configs."""
    vae = {key: value for key, value in configs["vae"].items()}
    models = {
        "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**configs["text_encoder"])),
        "transformer": QwenImageTransformer2DModel(**configs["transformer"]),
        "vae": AutoencoderKLQwenImage(**vae),
    }
    return {
        component: {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        for component, model in models.items()
    }


def load(checkpoint: Path) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.text_encoder.dtype != torch.float32:
        pipeline.text_encoder.float()
    return pipeline


def generate(pipeline: QwenImagePipeline, noise: np.ndarray, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """From `noise` [B, 16, h, w] to latents [B, 16, h, w] and pictures [B, H, W, 3] in [0, 1]."""
    b, c, h, w = noise.shape
    factor = pipeline.vae_scale_factor
    packed = pipeline._pack_latents(torch.from_numpy(noise)[:, None], b, c, h, w)
    arguments = {"height": h * factor, "width": w * factor, "max_sequence_length": 1024, **arguments}
    with torch.no_grad():
        latents = pipeline(latents=packed, output_type="latent", **arguments).images
        latents = pipeline._unpack_latents(latents, h * factor, w * factor, factor)
        std = torch.tensor(pipeline.vae.config.latents_std).view(1, c, 1, 1, 1)
        mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, c, 1, 1, 1)
        decoded = pipeline.vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0]
        pictures = pipeline.image_processor.postprocess(decoded, output_type="np")
    return latents[:, :, 0].numpy(), pictures


def from_image(pipeline: QwenImagePipeline, image: Any, noise: np.ndarray, **arguments: Any) -> np.ndarray:
    """From a picture and `noise` [1, 16, h, w] to a picture [H, W, 3] in [0, 1].

    The pipeline draws from what the encoder thinks possible, and draws its noise: here it is the mean, and ours.
    """
    before = img2img.retrieve_latents, img2img.randn_tensor
    img2img.retrieve_latents = lambda encoded, generator: encoded.latent_dist.mode()
    img2img.randn_tensor = lambda shape, **options: torch.from_numpy(noise)[:, None].to(options["dtype"])
    factor = pipeline.vae_scale_factor
    size = {"height": noise.shape[2] * factor, "width": noise.shape[3] * factor}
    made = QwenImageImg2ImgPipeline(**pipeline.components)
    made.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad():
            return made(image=image, output_type="np", max_sequence_length=1024, **size, **arguments).images[0]
    finally:
        img2img.retrieve_latents, img2img.randn_tensor = before
