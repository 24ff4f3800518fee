"""The autoencoder: its layouts, its loss, one training step, its whitening and its score."""

import dataclasses

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from perfusion_jax.emoji_world.muon import MuonAndAdam
from pretraining import training_tools
from pretraining.scenes import PIXELS


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the autoencoder is built and trained."""

    block_out_channels: tuple[int, ...] = (16, 40, 96)
    latent_channels: int = 8
    norm_num_groups: int = 8
    batch_size: int = 16
    muon_rate: float = 3e-3
    adam_rate: float = 2e-3
    warm_up_steps: int = 200
    average_decay: float = 0.998
    kl_weight: float = 5e-4
    # Share of the steps in which latents are turned, mirrored or shrunk before they are decoded, and the picture with
    # them (EQ-VAE, arXiv 2502.09509): latents that move as pictures do are easier to denoise.
    equivariance_share: float = 0.25


LAYOUTS = {
    "4x4": Settings(latent_channels=4),
    "4x8": Settings(),
    "8x16": Settings(block_out_channels=(16, 40, 80, 160), latent_channels=16),
    "8x32": Settings(block_out_channels=(16, 40, 80, 160), latent_channels=32),
}
"""Factor by which pictures shrink, x channels of the latents."""


def build_autoencoder(settings: Settings) -> AutoencoderKL:
    """An untrained AutoencoderKL."""
    blocks = len(settings.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=settings.block_out_channels,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.norm_num_groups,
        sample_size=PIXELS,
        scaling_factor=1.0,
    )


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, plus the absolute error of edges and of 4 x 4 averages (colour). Scalar.

    Args:
        output, target: float [batch, 3, height, width] in [-1, 1].
    """
    error = output - target
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    colour = functional.avg_pool2d(error, 4).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.25 * edges + 0.5 * colour


def rate_factor(step: int, total_steps: int, settings: Settings) -> float:
    """Share of the full learning rates: linear warm-up, one, and over the last half a straight line to zero."""
    warm_up = min(1.0, (step + 1) / settings.warm_up_steps)
    return warm_up * min(1.0, 2 * (1 - step / total_steps))


def move(maps: torch.Tensor, way: int) -> torch.Tensor:
    """Maps [batch, channels, side, side] mirrored (0), turned by a quarter (1, 2) or shrunk to half (3)."""
    if way == 0:
        return maps.flip(-1)
    if way < 3:
        return torch.rot90(maps, 1 if way == 1 else 3, (-2, -1))
    return functional.avg_pool2d(maps, 2)


def train_step(
    autoencoder: AutoencoderKL,
    optimizer: MuonAndAdam,
    factor: float,
    pictures: torch.Tensor,
    settings: Settings,
    generator: torch.Generator,
) -> tuple[float, float]:
    """One optimiser step at `factor` of the learning rates.

    Args:
        pictures: float [batch, 3, PIXELS, PIXELS] in [-1, 1].
        generator: on the CPU.

    Returns:
        (reconstruction loss, Kullback-Leibler term in nats per latent)
    """
    with training_tools.autocast(pictures.device):
        posterior = autoencoder.encode(pictures).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        noise = training_tools.normal(mean.shape, generator, mean.device)
        latents = mean + (0.5 * log_variance).exp() * noise
        target = pictures
        if torch.rand((), generator=generator) < settings.equivariance_share:
            way = int(torch.randint(4, (), generator=generator))
            latents, target = move(latents, way), move(pictures, way)
        output = autoencoder.decode(latents).sample.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    reconstruction = reconstruction_loss(output, target)
    (reconstruction + settings.kl_weight * divergence).backward()
    torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
    optimizer.step(factor)
    return reconstruction.item(), divergence.item()


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, pictures: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Encode and decode float pictures [count, 3, PIXELS, PIXELS] without noise; the same type and shape."""
    latents = encode(autoencoder, pictures, batch_size)
    return torch.cat([autoencoder.decode(some).sample for some in latents.split(batch_size)]).clamp(-1, 1)


def psnr(pictures: torch.Tensor, reconstructions: torch.Tensor, masks: torch.Tensor | None = None) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB: float64 [count].

    Args:
        pictures, reconstructions: float [count, 3, height, width] in [-1, 1]; compared as 8-bit pixels.
        masks: float [count, height, width], if only a part counts.
    """
    eight_bits = [((each + 1) * 127.5).round().clamp(0, 255).double() for each in (pictures, reconstructions)]
    squared = (eight_bits[0] - eight_bits[1]).square().mean(1)
    weights = torch.ones_like(squared) if masks is None else masks.double()
    error = (squared * weights).sum((1, 2)) / weights.sum((1, 2))
    return (10 * torch.log10(255**2 / error.clamp(min=1e-6))).cpu().numpy()


@torch.no_grad()
def fold(autoencoder: AutoencoderKL, matrix: torch.Tensor, mean: torch.Tensor) -> None:
    """Turn latents z into `matrix (z - mean)`; the decoder undoes it, so pictures stay what they are.

    Folded into the two quant convolutions: the model's layout stays what it is.

    Args:
        matrix: float64 [channels, channels], invertible.
        mean: float64 [channels].
    """
    channels = len(mean)
    encode, decode = autoencoder.quant_conv, autoencoder.post_quant_conv
    weight, bias = encode.weight[:channels].double().flatten(1), encode.bias[:channels].double()
    encode.weight[:channels] = (matrix @ weight).reshape(encode.weight[:channels].shape).to(encode.weight.dtype)
    encode.bias[:channels] = (matrix @ (bias - mean)).to(encode.bias.dtype)
    # Log-variances are of the old axes and say nothing of the new ones: none but the mean is used from here on.
    weight = decode.weight.double().flatten(1)
    decode.bias += (weight @ mean).to(decode.bias.dtype)
    decode.weight.copy_((weight @ torch.linalg.inv(matrix)).reshape(decode.weight.shape))


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pictures: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Latents float [count, channels, grid, grid] of pictures as of `reconstruct`."""
    return torch.cat([autoencoder.encode(some).latent_dist.mean for some in pictures.split(batch_size)])


@torch.no_grad()
def whiten(autoencoder: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Turn latents so that over `pictures` they have mean zero and the unit covariance.

    Args:
        pictures: float [count, 3, PIXELS, PIXELS] in [-1, 1].
    """
    latents = encode(autoencoder, pictures)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    fold(autoencoder, (vectors / values.sqrt()) @ vectors.T, flat.mean(0))


@torch.no_grad()
def impact(autoencoder: AutoencoderKL, pictures: torch.Tensor, step: float = 0.1) -> torch.Tensor:
    """How much the decoded picture changes along each axis of the latents, and how alike two axes change it.

    Args:
        pictures: float [count, 3, PIXELS, PIXELS] in [-1, 1].
        step: how far latents are moved.

    Returns:
        float64 [channels, channels], the mean over cells of J^T J, J the derivative of the picture by a cell's latent.
    """
    latents = encode(autoencoder, pictures)
    channels, side = latents.shape[1], latents.shape[-1]
    # Cells so far apart that the changes they make hardly overlap.
    cells = torch.zeros(side, side, dtype=latents.dtype, device=latents.device)
    cells[2::5, 2::5] = step
    product = torch.zeros(channels, channels, dtype=torch.float64, device=latents.device)
    for some in latents.split(64):
        before = autoencoder.decode(some).sample
        moved = [some + cells * axis[None, :, None, None] for axis in torch.eye(channels).to(latents)]
        changes = torch.stack([(autoencoder.decode(each).sample - before).flatten() for each in moved]) / step
        product += (changes @ changes.T).double()
    return product.cpu() / (len(latents) * (cells > 0).sum().cpu())


@torch.no_grad()
def scale_by_impact(autoencoder: AutoencoderKL, pictures: torch.Tensor, least: float = 0.1) -> torch.Tensor:
    """Turn and shrink white latents, so that a step of a given length changes the picture as much along any axis.

    White latents give every axis the same weight, in the noise and in the loss. A few of them hold the colour of a
    cell, and nearly all of what one sees; the others hold details within the cell, which nothing can foretell until the
    colours around are known, and they make up most of the loss. Scaled, they are what they are in pixels: small, and
    the last thing that is told from the noise.

    Args:
        pictures: float [count, 3, PIXELS, PIXELS] in [-1, 1].
        least: scale of axes that change nearly nothing; the largest is 1.

    Returns:
        float64 [channels, channels]: new latents are this matrix times the old; its rows are orthogonal.
    """
    values, vectors = torch.linalg.eigh(impact(autoencoder, pictures))
    scales = (values.clamp(min=0) / values[-1]).sqrt().clamp(min=least)
    matrix = (scales[:, None] * vectors.T)[scales.argsort(descending=True)]
    fold(autoencoder, matrix, torch.zeros_like(scales))
    return matrix
