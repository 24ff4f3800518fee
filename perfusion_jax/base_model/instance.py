"""An instance encoder: pictures to unit vectors that are near where they show the same individual."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model.embedding import embed_all, fit_pictures, unit
from perfusion_jax.base_model.flax_classes import FlaxViTModule, ViTConfig
from perfusion_jax.base_model.source import read_config, read_preprocessor
from perfusion_jax.base_model.weights import find_checkpoint, read_tree
from perfusion_jax.method.surgery import Params


@dataclass(frozen=True, eq=False)
class InstanceEncoder:
    """A frozen vision transformer whose class token is the embedding, as DINO's is (arXiv 2104.14294).

    Attributes:
        params: its weights.
        module: the architecture.
        mean, deviation: by which the channels of pictures in [0, 1] are normalised, three numbers each.
    """

    params: Params
    module: FlaxViTModule
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def embed_images(self, params: Params, images: jax.Array) -> jax.Array:
        """Embeds pictures; a pure function of its arguments.

        Args:
            params: the weights.
            images: [batch, height, width, 3] in [-1, 1]; of another size than the encoder's, they are resized to it.

        Returns:
            Unit vectors, float32 [batch, width].
        """
        fitted = fit_pictures(images, self.module.config.image_size, self.mean, self.deviation)
        return unit(self.module.apply({"params": params}, fitted)[0][:, 0])

    @cached_property
    def _compiled(self) -> Callable[..., jax.Array]:
        return jax.jit(self.embed_images)

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """Embeds pictures, uint8 [count, height, width, 3]: unit vectors, float32 [count, width]."""
        return embed_all(self._compiled, self.params, pixels.astype(np.float32) / 127.5 - 1)


def load_instance_encoder(folder: str | Path) -> InstanceEncoder:
    """Loads a ViT from a folder in transformers' layout. PyTorch is not needed.

    Raises:
        InputError: it is not complete, damaged, or no ViT.
    """
    folder = Path(folder)
    config = ViTConfig.from_dict(read_config(folder / "config.json", "ViTModel"))
    module = FlaxViTModule(config, add_pooling_layer=False)
    preprocessor = read_preprocessor(folder)
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    shapes = jax.eval_shape(lambda key: module.init(key, pixels)["params"], jax.random.key(0))
    return InstanceEncoder(
        params=read_tree(find_checkpoint(folder, None), shapes, jnp.dtype(jnp.float32), str(folder)),
        module=module,
        mean=preprocessor.mean,
        deviation=preprocessor.deviation,
    )
