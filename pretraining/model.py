"""Build the parts of the text-to-image model and write them as one Stable Diffusion folder."""

import dataclasses
import pathlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pretraining.scenes import PIXELS
from pretraining.tokenizer import MODEL_MAX_LENGTH

CONTEXT_WIDTH = 160
"""Width of the text encodings. Small beside the vocabulary, so that their covariance can be inverted safely."""


@dataclasses.dataclass(frozen=True)
class UNetShape:
    """Channels of the UNet's blocks, the heads of each, and which of them read the text.

    Only block classes and channel counts (multiples of 32) that diffusers' Flax UNet knows as well.
    """

    channels: tuple[int, ...]
    heads: tuple[int, ...]
    reads_text: tuple[bool, ...]


SHAPES = {
    16: UNetShape((64, 128, 192), (2, 4, 6), (False, True, True)),
    8: UNetShape((128, 256), (4, 8), (True, True)),
}
"""The UNet's shape by the side of the grid of latents."""


def grid_of(autoencoder: AutoencoderKL) -> int:
    """Side of the grid of latents that a picture becomes."""
    return PIXELS // 2 ** (len(autoencoder.config.block_out_channels) - 1)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIPTextModel for `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT_WIDTH,
        intermediate_size=4 * CONTEXT_WIDTH,
        projection_dim=CONTEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=MODEL_MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # The default initialisation (0.02) is made for widths of 512 and more.
        initializer_factor=1.0,
    )
    return CLIPTextModel(config)


def build_unet(latent_channels: int, grid: int) -> UNet2DConditionModel:
    """An untrained UNet for latents of `latent_channels` on a `grid` x `grid` grid."""
    shape = SHAPES[grid]
    down = tuple("CrossAttnDownBlock2D" if reads else "DownBlock2D" for reads in shape.reads_text)
    up = tuple("CrossAttnUpBlock2D" if reads else "UpBlock2D" for reads in reversed(shape.reads_text))
    return UNet2DConditionModel(
        sample_size=grid,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=shape.channels,
        layers_per_block=1,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=CONTEXT_WIDTH,
        attention_head_dim=shape.heads,  # diffusers' misnomer: the number of heads
        use_linear_projection=True,
    )


@torch.no_grad()
def lift_context(text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokens: torch.Tensor) -> None:
    """Moves all text encodings by a constant, so that their covariance can be inverted; the model stays what it is.

    The uncentred covariance that the method inverts is that of the encodings about their mean, and the mean's own.
    Layer norm's output e = gamma n + beta has (e - beta) . (1 / gamma) = 0, so along that normal there is the mean
    alone; and along others it is hundreds of times as large as the least deviation. So the mean is put on the normal,
    as far out as encodings deviate along other axes. The constant adds the same to all keys, which softmax ignores, and
    the same to all values, which the bias of the attention's output projection takes away again.

    Args:
        text_encoder, unet: are changed.
        tokens: of captions, by which the mean is measured, int [count, length]; what follows their end is left out.
    """
    norm = text_encoder.text_model.final_layer_norm
    normal = torch.nn.functional.normalize(1 / norm.weight, dim=0)
    ends = (tokens == text_encoder.config.eos_token_id).cumsum(1)
    encodings = text_encoder(tokens).last_hidden_state[ends <= 1]
    shift = encodings.std(0).mean() * normal - encodings.mean(0)
    norm.bias += shift
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.to_out[0].bias -= module.to_out[0].weight @ (module.to_v.weight @ shift)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, for a model that predicts velocity."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def build_pipeline(
    autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of the given parts, without safety checker."""
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> int:
    """Write `pipeline` in half precision, as the folder that `from_pretrained` reads. Returns its size in bytes."""
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    return sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*") if file.is_file())


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seed: int,
    steps: int = 30,
    guidance_scale: float = 4.0,
    batch_size: int = 32,
) -> np.ndarray:
    """Pictures of `prompts`, each from noise of its own: prompt i starts from seed + i.

    Returns:
        uint8 array [prompts, height, width, 3].
    """
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(batch))]
        output = pipeline(
            batch, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, output_type="pt"
        )
        pictures.append(output.images.cpu())
    pixels = (torch.cat(pictures).float() * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()
