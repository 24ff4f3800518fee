"""An instance encoder: pictures to unit vectors that are near where they show the same individual."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model.embedding import embed_all, fit_pictures, resize_positions, unit
from perfusion_jax.base_model.flax_classes import Dinov2Config, FlaxDinov2Module, FlaxViTModule, ViTConfig
from perfusion_jax.base_model.source import find_transformers_folder, read_config, read_preprocessor
from perfusion_jax.base_model.weights import find_checkpoint, read_tree
from perfusion_jax.method.surgery import Params
from perfusion_jax.runtime.errors import InputError


@dataclass(frozen=True, eq=False)
class InstanceEncoder:
    """A frozen vision transformer whose class token is the embedding, as DINO's is (arXiv 2104.14294, 2304.07193).

    Attributes:
        params: its weights, the position embeddings on the grid of the pictures that it takes.
        module: the architecture.
        scaled: side to which pictures are resized before their middle is cut out, in pixels.
        mean, deviation: by which the channels of pictures in [0, 1] are normalised, three numbers each.
    """

    params: Params
    module: FlaxViTModule | FlaxDinov2Module
    scaled: int
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
        fitted = fit_pictures(images, self.module.config.image_size, self.mean, self.deviation, self.scaled)
        return unit(self.module.apply({"params": params}, fitted)[0][:, 0])

    @cached_property
    def _compiled(self) -> Callable[..., jax.Array]:
        return jax.jit(self.embed_images)

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """Embeds pictures, uint8 [count, height, width, 3]: unit vectors, float32 [count, width]."""
        return embed_all(self._compiled, self.params, pixels.astype(np.float32) / 127.5 - 1)


def load_instance_encoder(source: str | Path) -> InstanceEncoder:
    """Loads a ViT (DINO) or a DINOv2 from a folder in transformers' layout or a hub id. PyTorch is not needed.

    Raises:
        InputError: it cannot be found, is not complete, damaged, or neither of the two.
        UnavailableError: the hub cannot be reached.
    """
    folder = find_transformers_folder(str(source))
    file = folder / "config.json"
    given = read_config(file, "ViTModel", "Dinov2Model")
    preprocessor = read_preprocessor(folder)
    native, patch = given["image_size"], given["patch_size"]
    scaled = preprocessor.side or native
    side = preprocessor.crop or scaled
    if side % patch or side > scaled:
        raise InputError(
            f"{folder / 'preprocessor_config.json'}: pictures of {side} pixels, cut out of {scaled}, for {file}, which "
            f"takes tiles of {patch} pixels"
        )
    params = read_tree(
        find_checkpoint(folder, None),
        jax.eval_shape(lambda key: _initial_params(_module(given), key), jax.random.key(0)),
        jnp.dtype(jnp.float32),
        str(folder),
    )
    embeddings = params["embeddings"]
    positions = resize_positions(np.asarray(embeddings["position_embeddings"])[0], side // patch)
    return InstanceEncoder(
        params={**params, "embeddings": {**embeddings, "position_embeddings": jnp.asarray(positions)[None]}},
        module=_module({**given, "image_size": side}),
        scaled=scaled,
        mean=preprocessor.mean,
        deviation=preprocessor.deviation,
    )


def _module(config: Mapping[str, Any]) -> FlaxViTModule | FlaxDinov2Module:
    if "Dinov2Model" in config["architectures"]:
        return FlaxDinov2Module(Dinov2Config.from_dict(dict(config)))
    return FlaxViTModule(ViTConfig.from_dict(dict(config)), add_pooling_layer=False)


def _initial_params(module: FlaxViTModule | FlaxDinov2Module, key: jax.Array) -> Params:
    side = module.config.image_size
    return module.init(key, jnp.zeros((1, side, side, 3)))["params"]
