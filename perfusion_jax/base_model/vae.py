"""The frozen autoencoder: pictures to latents and back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from perfusion_jax.base_model.flax_classes import FlaxAutoencoderKL
from perfusion_jax.method.surgery import Params
from perfusion_jax.runtime.errors import InputError


class LatentScale(NamedTuple):
    """How the autoencoder's latents are brought to about mean 0 and deviation 1: (z - mean) / deviation x factor.

    Attributes:
        factor: a number.
        mean, deviation: one number for all channels, or one for each.
    """

    factor: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], channels: int, where: str) -> "LatentScale":
        """Reads it from an autoencoder's config.

        Args:
            config: with `scaling_factor`, and `latents_mean` and `latents_std` or neither.
            channels: of a latent.
            where: what to call the config in errors.

        Raises:
            InputError: mean and deviation are no numbers for each channel.
        """
        factor = config.get("scaling_factor", 0.18215)
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None and deviation is None:
            return cls(factor, (0.0,), (1.0,))
        try:
            scale = cls(factor, tuple(map(float, mean)), tuple(map(float, deviation)))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: latents_mean and latents_std are not both lists of numbers") from error
        if not len(scale.mean) == len(scale.deviation) == channels or min(scale.deviation) <= 0:
            raise InputError(f"{where}: latents_mean and latents_std need {channels} numbers each, the latter above 0")
        return scale


class LatentDistribution(NamedTuple):
    """The distribution of a picture's latents, a normal; already scaled.

    Draw latents anew at every training step as `mean + std * jax.random.normal(key, mean.shape)`.

    Attributes:
        mean: float32 [batch, height / f, width / f, channels].
        std: the same shape, at least 0.
    """

    mean: jax.Array
    std: jax.Array


def encode_image(
    module: FlaxAutoencoderKL, scale: LatentScale, vae_params: Params, images: jax.Array
) -> LatentDistribution:
    """Encodes pictures.

    Args:
        module: the autoencoder's architecture.
        scale: of its latents.
        vae_params: its weights.
        images: [batch, height, width, 3], in [-1, 1]; height and width divisible by the autoencoder's factor f (8
            for Stable Diffusion).
    """
    posterior = module.apply({"params": vae_params}, jnp.moveaxis(images, -1, 1), method=module.encode).latent_dist
    mean, std = posterior.mean.astype(jnp.float32), posterior.std.astype(jnp.float32)
    deviation = jnp.asarray(scale.deviation)
    return LatentDistribution(
        (mean - jnp.asarray(scale.mean)) / deviation * scale.factor, std / deviation * scale.factor
    )


def decode_latent(module: FlaxAutoencoderKL, scale: LatentScale, vae_params: Params, latents: jax.Array) -> jax.Array:
    """Decodes latents to pictures, float32 [batch, height, width, 3], about in [-1, 1] (not clipped).

    Args:
        module: the autoencoder's architecture.
        scale: of its latents.
        vae_params: its weights.
        latents: scaled latents, [batch, height / f, width / f, channels].
    """
    # The module takes channels last as well as first: it looks whether the last axis has as many entries as there
    # are channels.
    mean, deviation = (jnp.asarray(numbers, latents.dtype) for numbers in (scale.mean, scale.deviation))
    unscaled = latents / scale.factor * deviation + mean
    pictures = module.apply({"params": vae_params}, unscaled, method=module.decode).sample
    return jnp.moveaxis(pictures, 1, -1).astype(jnp.float32)
