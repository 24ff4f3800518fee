"""The autoencoder: its shape, its loss, one training step, its whitening and its score."""

import dataclasses
import math

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from perfusion_jax.emoji_world import scenes, torch_training
from perfusion_jax.emoji_world.muon import MuonAndAdam
from perfusion_jax.emoji_world.scenes import Sprites


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the autoencoder is built and trained."""

    block_out_channels: tuple[int, ...] = (16, 32, 64, 112)
    latent_channels: int = 16
    # Not 32: with 16 channels at full resolution, groups must hold several. Other counts were not compared.
    norm_num_groups: int = 4
    batch_size: int = 16
    muon_rate: float = 3e-3
    adam_rate: float = 2e-3
    warm_up_steps: int = 200
    average_decay: float = 0.998
    kl_weight: float = 3e-4
    other_drawings_share: float = 0.3
    save_every: int = 200
    look_every: int = 800


def build_autoencoder(settings: Settings) -> AutoencoderKL:
    """An untrained AutoencoderKL for 64-pixel pictures, downsampling by 8."""
    blocks = len(settings.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=settings.block_out_channels,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.norm_num_groups,
        sample_size=scenes.PIXELS,
        scaling_factor=1.0,
    )


def render_batch(seed: int, step: int, batch_size: int, sprites: Sprites, other_share: float) -> np.ndarray:
    """Scenes of one step as uint8 [batch, 64, 64, 3]; a share of them shows any drawing instead of the categories'.

    Args:
        sprites: world sprites, plus "other": every drawing of the world's vendors.
    """
    others = len(sprites["other"])
    counts = {name: len(stack) for name, stack in sprites.items()}
    images = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        random = np.random.default_rng([seed, index])
        description = scenes.invent(random, counts)
        if random.random() < other_share:
            things = tuple(
                dataclasses.replace(thing, category="other", drawing=int(random.integers(others)), headwear=None)
                for thing in description.things
            )
            description = dataclasses.replace(description, things=things)
        images.append(scenes.draw(description, sprites)[0])
    return np.stack(images)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, plus the absolute error of edges and of 4 x 4 averages (colour). Scalar.

    Args:
        output, target: float [batch, 3, 64, 64] in [-1, 1].
    """
    error = output - target
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    colour = functional.avg_pool2d(error, 4).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.25 * edges + 0.5 * colour


def rate_factor(step: int, total_steps: int, settings: Settings) -> float:
    """Share of the full learning rates: linear warm-up, then half a cosine down to zero at `total_steps`."""
    warm_up = min(1.0, (step + 1) / settings.warm_up_steps)
    return warm_up * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def train_step(
    autoencoder: AutoencoderKL,
    optimizer: MuonAndAdam,
    factor: float,
    images: torch.Tensor,
    settings: Settings,
    generator: torch.Generator,
    encoder_frozen: bool,
) -> tuple[float, float]:
    """One optimiser step at `factor` of the learning rates.

    Returns:
        (reconstruction loss, Kullback-Leibler term in nats per latent)
    """
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(not encoder_frozen):
            posterior = autoencoder.encode(images).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator)
        # Sampled latents (of unit variance) are never exact: the decoder learns to clean a little noise.
        deviation = torch.tensor(0.05) if encoder_frozen else (0.5 * log_variance).exp()
        output = autoencoder.decode(mean + deviation * noise).sample.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    reconstruction = reconstruction_loss(output, images)
    loss = reconstruction if encoder_frozen else reconstruction + settings.kl_weight * divergence
    loss.backward()
    torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
    optimizer.step(factor)
    return reconstruction.item(), divergence.item()


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """Encode and decode uint8 images [count, 64, 64, 3] without noise; returns the same type and shape."""
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    outputs = [
        autoencoder.decode(autoencoder.encode(torch_training.from_pixels(batch)).latent_dist.mean).sample
        for batch in batches
    ]
    return torch_training.to_pixels(torch.cat(outputs))


def mean_psnr(images: np.ndarray, reconstructions: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB of uint8 images [count, height, width, 3]."""
    error = np.square(images.astype(np.float64) - reconstructions).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3))))


@torch.no_grad()
def whiten(autoencoder: AutoencoderKL, images: torch.Tensor) -> None:
    """Give each latent channel mean 0 and variance 1 over `images`, by changing only the two 1 x 1 quant convolutions.

    The function encode-then-decode stays what it was; afterwards latents need no scaling factor.
    """
    latents = torch.cat([autoencoder.encode(batch).latent_dist.mean for batch in images.split(64)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(mean)
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[None, :, None, None]
    before.weight[:channels] /= deviation[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / deviation
    before.bias[channels:] -= 2 * deviation.log()
