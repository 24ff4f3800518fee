"""An instance encoder: pictures to unit vectors that are near where they show the same individual."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model.embedding import embed_all, fit_pictures, resize_positions, unit
from perfusion_jax.base_model.flax_classes import Dinov2Config, FlaxDinov2Module, FlaxViTModule, ViTConfig
from perfusion_jax.base_model.preprocessor import read_preprocessor
from perfusion_jax.base_model.source import find_transformers_folder, read_config
from perfusion_jax.base_model.weights import find_checkpoint, read_tree
from perfusion_jax.method.surgery import Params
from perfusion_jax.runtime.errors import InputError

Config: TypeAlias = ViTConfig | Dinov2Config
Module: TypeAlias = FlaxViTModule | FlaxDinov2Module


@dataclass(frozen=True, eq=False)
class InstanceEncoder:
    """A frozen vision transformer whose class token is the embedding, as DINO's is (arXiv 2104.14294, 2304.07193).

    Attributes:
        params: its weights, the position embeddings on the grid of the pictures that it takes.
        module: the architecture.
        scaled: side to which pictures are resized before their middle is cut out, in pixels.
        mean, deviation: by which the channels of pictures in [0, 1] are normalised, three numbers each.
        method: by which they are resized, of `jax.image.resize`.
    """

    params: Params
    module: Module
    scaled: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    method: str

    def embed_images(self, params: Params, images: jax.Array) -> jax.Array:
        """Embeds pictures; a pure function of its arguments.

        Args:
            params: the weights.
            images: [batch, height, width, 3] in [-1, 1]; of another size than the encoder's, they are resized to it.

        Returns:
            Unit vectors, float32 [batch, width].
        """
        side = self.module.config.image_size
        fitted = fit_pictures(images, side, self.mean, self.deviation, self.scaled, self.method)
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
    config = _read_config(file)
    preprocessor = read_preprocessor(folder)
    patch, scaled = config.patch_size, preprocessor.side or config.image_size
    side = preprocessor.crop or scaled
    if side % patch or side > scaled:
        raise InputError(
            f"{folder / 'preprocessor_config.json'}: pictures of {side} pixels, cut out of {scaled}, for {file}, which "
            f"takes tiles of {patch} pixels"
        )
    params = read_tree(
        find_checkpoint(folder, None),
        jax.eval_shape(lambda key: _initial_params(_module(config), key), jax.random.key(0)),
        jnp.dtype(jnp.float32),
        str(folder),
    )
    embeddings = params["embeddings"]
    positions = resize_positions(np.asarray(embeddings["position_embeddings"])[0], side // patch)
    return InstanceEncoder(
        params={**params, "embeddings": {**embeddings, "position_embeddings": jnp.asarray(positions)[None]}},
        module=_module(type(config).from_dict({**config.to_dict(), "image_size": side})),
        scaled=scaled,
        mean=preprocessor.mean,
        deviation=preprocessor.deviation,
        method=preprocessor.method,
    )


def _read_config(file: Path) -> Config:
    """Reads the config of an encoder.

    Raises:
        InputError: it is missing, not JSON, or of a model that cannot be run.
    """
    given = read_config(file, "ViTModel", "Dinov2Model")
    if "Dinov2Model" not in given["architectures"]:
        return ViTConfig.from_dict(given)
    config = Dinov2Config.from_dict(given)
    # The weights hold the scales as they were trained; this, with which they began, Flax multiplies them by, twice.
    config.layerscale_value = 1.0
    if config.mlp_ratio != int(config.mlp_ratio):
        raise InputError(f"{file}: mlp_ratio is {config.mlp_ratio}; it must be a whole number")
    config.mlp_ratio = int(config.mlp_ratio)  # of 4.0 Flax would make a layer whose width is a float
    return config


def _module(config: Config) -> Module:
    return FlaxViTModule(config, add_pooling_layer=False) if isinstance(config, ViTConfig) else FlaxDinov2Module(config)


def _initial_params(module: Module, key: jax.Array) -> Params:
    side = module.config.image_size
    return module.init(key, jnp.zeros((1, side, side, 3)))["params"]
