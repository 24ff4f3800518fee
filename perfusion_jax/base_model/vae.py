"""The frozen autoencoder: pictures to latents and back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from perfusion_jax.base_model.flax_classes import FlaxAutoencoderKL
from perfusion_jax.method.surgery import Params


class LatentDistribution(NamedTuple):
    """The distribution of a picture's latents, a normal; already multiplied by the checkpoint's scaling factor.

    Draw latents anew at every training step as `mean + std * jax.random.normal(key, mean.shape)`.

    Attributes:
        mean: float32 [batch, height / f, width / f, channels].
        std: the same shape, at least 0.
    """

    mean: jax.Array
    std: jax.Array


def encode_image(module: FlaxAutoencoderKL, vae_params: Params, images: jax.Array) -> LatentDistribution:
    """Encodes pictures.

    Args:
        module: the autoencoder's architecture; its config holds the scaling factor.
        vae_params: its weights.
        images: [batch, height, width, 3], in [-1, 1]; height and width divisible by the autoencoder's factor f (8
            for Stable Diffusion).
    """
    posterior = module.apply({"params": vae_params}, jnp.moveaxis(images, -1, 1), method=module.encode).latent_dist
    scale = module.config.scaling_factor
    return LatentDistribution(posterior.mean.astype(jnp.float32) * scale, posterior.std.astype(jnp.float32) * scale)


def decode_latent(module: FlaxAutoencoderKL, vae_params: Params, latents: jax.Array) -> jax.Array:
    """Decodes latents to pictures, float32 [batch, height, width, 3], about in [-1, 1] (not clipped).

    Args:
        module: the autoencoder's architecture.
        vae_params: its weights.
        latents: scaled latents, [batch, height / f, width / f, channels].
    """
    # The module takes channels last as well as first: it looks whether the last axis has as many entries as there
    # are channels.
    unscaled = latents / module.config.scaling_factor
    pictures = module.apply({"params": vae_params}, unscaled, method=module.decode).sample
    return jnp.moveaxis(pictures, 1, -1).astype(jnp.float32)
