"""CLIPSeg (Lüddecke and Ecker, arXiv 2112.10003): where in a picture is what a text names?

The Flax twin of transformers' CLIPSegForImageSegmentation, reading the same checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import text
from perfusion_jax.base_model.embedding import cubic_weights
from perfusion_jax.base_model.flax_classes import (
    CLIPSegConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    FlaxCLIPAttention,
    FlaxCLIPMLP,
    FlaxCLIPTextTransformer,
    FlaxCLIPVisionTransformer,
)
from perfusion_jax.base_model.preprocessor import read_preprocessor
from perfusion_jax.base_model.source import find_transformers_folder, read_config
from perfusion_jax.base_model.weights import find_checkpoint, read_tree
from perfusion_jax.method.surgery import Params


class _Clip(nn.Module):
    """The frozen CLIP inside: embeddings of texts, and a picture's hidden states."""

    text_config: CLIPTextConfig
    vision_config: CLIPVisionConfig
    projection_width: int

    def setup(self) -> None:
        self.text_model = FlaxCLIPTextTransformer(self.text_config)
        self.vision_model = FlaxCLIPVisionTransformer(self.vision_config)
        self.text_projection = nn.Dense(self.projection_width, use_bias=False)
        # Part of the checkpoint, though segmentation does not need them.
        self.visual_projection = nn.Dense(self.projection_width, use_bias=False)
        self.logit_scale = self.param("logit_scale", nn.initializers.zeros, ())

    def __call__(self, ids: jax.Array, pixels: jax.Array) -> tuple[jax.Array, Sequence[jax.Array]]:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        pooled = self.text_model(ids, jnp.ones_like(ids), positions)[1]
        output = self.vision_model(pixels, output_hidden_states=True)
        self.visual_projection(output.pooler_output)
        return self.text_projection(pooled), output.hidden_states


class _DecoderLayer(nn.Module):
    """A transformer layer with the norms after attention and after the perceptron."""

    config: CLIPVisionConfig

    def setup(self) -> None:
        self.self_attn = FlaxCLIPAttention(self.config)
        self.layer_norm1 = nn.LayerNorm(epsilon=self.config.layer_norm_eps)
        self.mlp = FlaxCLIPMLP(self.config)
        self.layer_norm2 = nn.LayerNorm(epsilon=self.config.layer_norm_eps)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        hidden = self.layer_norm1(hidden + self.self_attn(hidden)[0])
        return self.layer_norm2(hidden + self.mlp(hidden))


class _Upscale(nn.Module):
    """PyTorch's ConvTranspose2d with a stride equal to its kernel: each position becomes a tile of its own."""

    channels: int
    factor: int

    @nn.compact
    def __call__(self, grid: jax.Array) -> jax.Array:
        shape = (self.factor, self.factor, self.channels, grid.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        batch, height, width, _ = grid.shape
        tiles = jnp.einsum("bhwc,ijoc->bhiwjo", grid, kernel)
        return tiles.reshape(batch, height * self.factor, width * self.factor, self.channels) + bias


class _Decoder(nn.Module):
    """From a picture's hidden states and a text's embedding to a logit for each pixel."""

    config: CLIPSegConfig

    @nn.compact
    def __call__(self, states: Sequence[jax.Array], condition: jax.Array) -> jax.Array:
        config, vision = self.config, self.config.vision_config
        layer_config = CLIPVisionConfig.from_dict(
            {
                **vision.to_dict(),
                "hidden_size": config.reduce_dim,
                "num_attention_heads": config.decoder_num_attention_heads,
                "intermediate_size": config.decoder_intermediate_size,
                "hidden_act": "relu",
            }
        )
        hidden = jnp.zeros(())
        for number, state in enumerate(reversed(states)):
            hidden = nn.Dense(config.reduce_dim, name=f"reduces_{number}")(state) + hidden
            if number == config.conditional_layer:
                scale = nn.Dense(config.reduce_dim, name="film_mul")(condition)
                shift = nn.Dense(config.reduce_dim, name="film_add")(condition)
                hidden = scale[:, None] * hidden + shift[:, None]
            hidden = _DecoderLayer(layer_config, name=f"layers_{number}")(hidden)
        side = round((hidden.shape[1] - 1) ** 0.5)
        grid = hidden[:, 1:].reshape(-1, side, side, config.reduce_dim)
        if not config.use_complex_transposed_convolution:
            return _Upscale(1, vision.patch_size, name="transposed_convolution")(grid)[..., 0]
        factor = vision.patch_size // 4
        grid = nn.Conv(config.reduce_dim, (3, 3), padding=1, name="transposed_convolution_0")(grid)
        grid = _Upscale(config.reduce_dim // 2, factor, name="transposed_convolution_2")(nn.relu(grid))
        return _Upscale(1, factor, name="transposed_convolution_4")(nn.relu(grid))[..., 0]


class _ClipSeg(nn.Module):
    config: CLIPSegConfig

    def setup(self) -> None:
        config = self.config
        self.clip = _Clip(
            CLIPTextConfig.from_dict(config.text_config.to_dict()),
            CLIPVisionConfig.from_dict(config.vision_config.to_dict()),
            config.projection_dim,
        )
        self.decoder = _Decoder(config)

    def __call__(self, ids: jax.Array, pixels: jax.Array) -> jax.Array:
        condition, states = self.clip(ids, pixels)
        # The first state is the input of the first layer.
        return self.decoder([states[layer + 1] for layer in self.config.extract_layers], condition)


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A frozen CLIPSeg.

    Attributes:
        params: its weights.
        tokenizer: texts to token ids.
        module: the architecture.
        side: of the pictures it takes, in pixels.
        mean, deviation: by which the channels of pictures in [0, 1] are normalised, three numbers each.
    """

    params: Params
    tokenizer: text.PromptTokenizer
    module: Any
    side: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def logits(self, params: Params, ids: jax.Array, normalised: jax.Array) -> jax.Array:
        """Segments normalised pictures; a pure function of its arguments.

        Args:
            params: the weights.
            ids: int32 [batch, tokens].
            normalised: float32 [batch, side, side, 3].

        Returns:
            float32 [batch, side, side]: above 0 where the text's thing is.
        """
        return apply_at_any_size(self.module, params, ids, normalised)

    def masks(self, params: Params, ids: jax.Array, images: jax.Array) -> jax.Array:
        """Soft masks of square pictures in [-1, 1], [batch, size, size, 3]: float32 [batch, size, size] in [0, 1]."""
        size = images.shape[1]
        small = jax.image.resize((images + 1) / 2, (len(images), self.side, self.side, 3), "linear")
        logits = self.logits(params, ids, (small - jnp.asarray(self.mean)) / jnp.asarray(self.deviation))
        return jax.image.resize(jax.nn.sigmoid(logits), (len(images), size, size), "linear")

    @cached_property
    def _compiled(self) -> Callable[..., jax.Array]:
        return jax.jit(self.masks)

    def segment(self, text: str, images: np.ndarray) -> jax.Array:
        """Where a text's thing is in square pictures; arguments and result as for `masks`, compiled once."""
        return self._compiled(self.params, self.tokenizer([text] * len(images)), images)


def apply_at_any_size(module: nn.Module, params: Params, ids: jax.Array, pixels: jax.Array) -> jax.Array:
    """Runs a module whose vision tower was trained at another size: position embeddings are interpolated to this
    one.
    """
    grid = pixels.shape[1] // module.config.vision_config.patch_size

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        block = context.module
        if block.name != "position_embedding" or "vision_model" not in block.path or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        table = next_fun(*args, **kwargs)[0]
        old = round((len(table) - 1) ** 0.5)
        if old == grid:
            return table[None]
        weights = jnp.asarray(cubic_weights(old, grid))
        patches = jnp.einsum("yi,xj,ijc->yxc", weights, weights, table[1:].reshape(old, old, -1))
        return jnp.concatenate([table[:1], patches.reshape(grid * grid, -1)])[None]

    with nn.intercept_methods(intercept):
        logits: jax.Array = module.apply({"params": params}, ids, pixels)  # type: ignore[assignment]
    return logits


def load_segmenter(source: str | Path) -> Segmenter:
    """Loads a CLIPSeg from a folder in transformers' layout or a hub id, with its tokeniser. PyTorch is not needed.

    Raises:
        InputError: it cannot be found, is not complete, damaged, or no CLIPSeg.
    """
    folder = find_transformers_folder(str(source))
    config = CLIPSegConfig.from_dict(read_config(folder / "config.json", "CLIPSegForImageSegmentation"))
    preprocessor = read_preprocessor(folder)
    module = _ClipSeg(config)
    native = config.vision_config.image_size

    def initialise(key: jax.Array) -> Any:
        ids = jnp.zeros((1, config.text_config.max_position_embeddings), jnp.int32)
        return module.init(key, ids, jnp.zeros((1, native, native, 3)))["params"]

    return Segmenter(
        params=read_tree(
            find_checkpoint(folder, None),
            jax.eval_shape(initialise, jax.random.key(0)),
            jnp.dtype(jnp.float32),
            str(folder),
        ),
        tokenizer=text.load_tokenizer(folder, config.text_config),
        module=module,
        side=preprocessor.side or native,
        mean=preprocessor.mean,
        deviation=preprocessor.deviation,
    )
