"""An evaluator CLIP: pictures and texts to unit vectors whose products say how well they fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import text
from perfusion_jax.base_model.embedding import embed_all, fit_pictures, unit
from perfusion_jax.base_model.flax_classes import CLIPConfig, FlaxCLIPModule
from perfusion_jax.base_model.preprocessor import read_preprocessor
from perfusion_jax.base_model.source import find_transformers_folder, read_config
from perfusion_jax.base_model.weights import find_checkpoint, read_tree
from perfusion_jax.method.surgery import Params


@dataclass(frozen=True, eq=False)
class Clip:
    """A frozen CLIP.

    Attributes:
        params: weights of both towers.
        tokenizer: texts to token ids.
        module: the architecture.
        mean, deviation: by which the channels of pictures in [0, 1] are normalised, three numbers each.
    """

    params: Params
    tokenizer: text.PromptTokenizer
    module: FlaxCLIPModule
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def embed_images(self, params: Params, images: jax.Array) -> jax.Array:
        """Embeds pictures; a pure function of its arguments.

        Args:
            params: the weights.
            images: [batch, height, width, 3] in [-1, 1]; of another size than the tower's, they are resized to it.

        Returns:
            Unit vectors, float32 [batch, width].
        """
        side = self.module.config.vision_config.image_size
        normalised = fit_pictures(images, side, self.mean, self.deviation)

        def project(module: FlaxCLIPModule) -> jax.Array:
            return module.visual_projection(module.vision_model(normalised)[1])

        return unit(self.module.apply({"params": params}, method=project))

    def embed_texts(self, params: Params, ids: jax.Array) -> jax.Array:
        """Embeds tokenised texts, int32 [batch, tokens]: unit vectors, float32 [batch, width]. Pure."""
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)

        def project(module: FlaxCLIPModule) -> jax.Array:
            return module.text_projection(module.text_model(ids, jnp.ones_like(ids), positions)[1])

        return unit(self.module.apply({"params": params}, method=project))

    @cached_property
    def _compiled(self) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
        return jax.jit(self.embed_images), jax.jit(self.embed_texts)

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by to become the logits that this CLIP was trained with."""
        return float(jnp.exp(self.params["logit_scale"]))

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """Embeds pictures, uint8 [count, height, width, 3]: unit vectors, float32 [count, width]."""
        return embed_all(self._compiled[0], self.params, pixels.astype(np.float32) / 127.5 - 1)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: unit vectors, float32 [len(texts), width]."""
        return embed_all(self._compiled[1], self.params, self.tokenizer.captions(texts)[0])


def load_clip(source: str | Path) -> Clip:
    """Loads a CLIP from a folder in transformers' layout or a hub id, with its tokeniser. PyTorch is not needed.

    Raises:
        InputError: it cannot be found, is not complete, damaged, or no CLIP.
        UnavailableError: the hub cannot be reached.
    """
    folder = find_transformers_folder(str(source))
    config = CLIPConfig.from_dict(read_config(folder / "config.json", "CLIPModel"))
    module = FlaxCLIPModule(config)
    preprocessor = read_preprocessor(folder)
    side = config.vision_config.image_size

    def initialise(key: jax.Array) -> Any:
        ids = jnp.zeros((1, config.text_config.max_position_embeddings), jnp.int32)
        pixels = jnp.zeros((1, side, side, 3))
        return module.init(key, ids, pixels, jnp.ones_like(ids), jnp.zeros_like(ids))["params"]

    shapes = jax.eval_shape(initialise, jax.random.key(0))
    return Clip(
        params=read_tree(find_checkpoint(folder, None), shapes, jnp.dtype(jnp.float32), str(folder)),
        tokenizer=text.load_tokenizer(folder, config.text_config),
        module=module,
        mean=preprocessor.mean,
        deviation=preprocessor.deviation,
    )
