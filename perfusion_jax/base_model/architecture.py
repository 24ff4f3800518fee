"""The architecture of a frozen text-to-image model: all of it but its weights."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import text, unet, vae
from perfusion_jax.base_model.flax_classes import (
    CLIPTextConfig,
    FlaxAutoencoderKL,
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPTextModule,
    FlaxUNet2DConditionModel,
)
from perfusion_jax.base_model.layout import Layout, find_layout
from perfusion_jax.base_model.schedule import NoiseSchedule
from perfusion_jax.base_model.source import full_name
from perfusion_jax.base_model.text import Encoding, TextEncoder
from perfusion_jax.base_model.unet import SIZES, Added, Context, keys_values
from perfusion_jax.base_model.vae import LatentDistribution, LatentScale
from perfusion_jax.method import baselines
from perfusion_jax.method.baselines import Baseline
from perfusion_jax.method.concept import Concept
from perfusion_jax.method.surgery import Params, cross_attention_layers
from perfusion_jax.runtime.errors import InputError

# What the Flax classes compute whatever the config says: a config that asks for something else cannot be run.
_UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "class_embeddings_concat": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}
_VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_UNET_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
# How the embedding of timesteps is added to.
_ADDITIONS = (None, "text_time")
_TEXT_CLASSES = {
    "CLIPTextModel": FlaxCLIPTextModule,
    "FlaxCLIPTextModel": FlaxCLIPTextModule,
    "CLIPTextModelWithProjection": FlaxCLIPTextModelWithProjectionModule,
    "FlaxCLIPTextModelWithProjection": FlaxCLIPTextModelWithProjectionModule,
}
_VAE_BLOCKS = {"DownEncoderBlock2D", "UpDecoderBlock2D"}


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """A text-to-image model in the layout of Stable Diffusion, without its weights.

    It is hashable, and equal to another of the same configs, tokeniser and dtype: a static argument of compiled
    functions. The methods are pure functions of their array arguments, weights among them.

    Attributes:
        tokenizer: prompts to token ids.
        schedule: the noise schedule.
        unet, vae: the networks.
        latent_scale: of the VAE's latents.
        text_encoders: one, or several whose encodings stand side by side.
        shapes: of the weights by component (`unet`, `vae`, `text_encoder`, ...), as trees of `jax.ShapeDtypeStruct`.
        empty_prompt_is_zero: whether guidance leads away from zeros, and not from the encoding of an empty prompt.
        digest: SHA-256 of the configs and of the tokeniser's files, hexadecimal.
    """

    tokenizer: text.PromptTokenizer
    schedule: NoiseSchedule
    unet: FlaxUNet2DConditionModel
    vae: FlaxAutoencoderKL
    latent_scale: LatentScale
    text_encoders: tuple[TextEncoder, ...]
    shapes: dict[str, Params]
    empty_prompt_is_zero: bool
    digest: str

    def __eq__(self, other: object) -> bool:
        """Whether both compute the same of the same weights."""
        return isinstance(other, Architecture) and (self.digest, self.dtype) == (other.digest, other.dtype)

    def __hash__(self) -> int:
        """Goes with `==`."""
        return hash((self.digest, self.dtype))

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weights and of the computation."""
        return jnp.dtype(self.unet.dtype)

    @property
    def context_width(self) -> int:
        """Width of a text encoding, d_ctx: 768 for Stable Diffusion 1, 2048 for SDXL."""
        return self.unet.cross_attention_dim

    @property
    def text_components(self) -> tuple[str, ...]:
        """What the weights of the text encoders are called."""
        return tuple(encoder.component for encoder in self.text_encoders)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 4 for Stable Diffusion."""
        return self.vae.latent_channels

    @property
    def vae_factor(self) -> int:
        """Pixels of a picture per latent, in each direction: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.block_out_channels) - 1)

    def encode(
        self,
        params: Mapping[str, Params],
        ids: jax.Array | np.ndarray,
        concept_embeddings: jax.Array | None = None,
    ) -> Encoding:
        """Encodes tokenised prompts with the weights of the text encoders; see `text.encode`."""
        return text.encode(self.text_encoders, params, jnp.asarray(ids), concept_embeddings)

    def read(
        self, unet_params: Params, encoding: Encoding, sizes: jax.Array, super_encoding: Encoding | None = None
    ) -> Context:
        """Computes what the UNet reads of encoded prompts, under whatever edit is in its tree.

        Args:
            unet_params: the UNet, with or without edits.
            encoding: of the prompts, any number of leading axes.
            sizes: of the pictures, float32 [..., 6]; see `unet.Added`.
            super_encoding: of the same ids with the super-categories in place of the concepts, if keys, and the vector
                for the whole prompt, are to come from there (global key locking); see `unet.keys_values`.
        """
        of_keys = encoding if super_encoding is None else super_encoding
        layers = keys_values(unet_params, encoding.tokens, None if super_encoding is None else super_encoding.tokens)
        if not self.unet.addition_embed_type:
            return Context(layers)
        assert of_keys.pooled is not None  # `_check_fit` has seen to it
        return Context(layers, Added(of_keys.pooled, sizes))

    def denoise(self, unet_params: Params, latents: jax.Array, timesteps: jax.Array, context: Context) -> jax.Array:
        """Runs the UNet on what it reads of prompts; see `unet.denoise`."""
        return unet.denoise(self.unet, unet_params, latents, timesteps, context)

    def attention_maps(
        self, unet_params: Params, latents: jax.Array, timesteps: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the UNet and tells where it looks at which token; see `unet.attention_maps`."""
        return unet.attention_maps(self.unet, unet_params, latents, timesteps, context)

    def encode_image(self, vae_params: Params, images: jax.Array) -> LatentDistribution:
        """Encodes pictures in [-1, 1], [batch, height, width, 3]; see `vae.encode_image`."""
        return vae.encode_image(self.vae, self.latent_scale, vae_params, images)

    def decode_latent(self, vae_params: Params, latents: jax.Array) -> jax.Array:
        """Decodes latents to pictures, [batch, height, width, 3]; see `vae.decode_latent`."""
        return vae.decode_latent(self.vae, self.latent_scale, vae_params, latents)

    @property
    def picture_side(self) -> int:
        """Side of the pictures that the model was made for, in pixels: 512 for Stable Diffusion 1."""
        return self.unet.sample_size * self.vae_factor

    def new_concept_shapes(self) -> Concept:
        """Returns the shapes and dtypes of this model's concepts: a Concept of `jax.ShapeDtypeStruct`."""
        width = self.context_width
        return jax.eval_shape(
            Concept.from_super_category,
            cross_attention_layers(self.shapes["unet"]),
            self._embedding_shape,
            jax.ShapeDtypeStruct((width,), jnp.float32),
            jax.ShapeDtypeStruct((width, width), jnp.float32),
        )

    def word_alone(self, embedding: jax.Array) -> Concept:
        """Returns a concept that is a word, [token_width], and no edit: an edit of zeros acts on nothing."""
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), self.new_concept_shapes())
        return dataclasses.replace(zeros, embedding=jnp.asarray(embedding, jnp.float32))

    def baseline_shapes(self, method: str, rank: int = 1) -> Baseline:
        """Returns the shapes and dtypes of what another method learns on this model, as of `jax.ShapeDtypeStruct`.

        Args:
            method: a key of `method.baselines.BASELINES`.
            rank: of a LoRA.
        """
        initialise = functools.partial(baselines.begin, method, rank=rank)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.eval_shape(initialise, self.shapes["unet"], self._embedding_shape, key)

    @property
    def _embedding_shape(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sum(encoder.width for encoder in self.text_encoders),), jnp.float32)


def load_architecture(
    source: str | Path, *, dtype: jnp.dtype = jnp.float32, revision: str | None = None
) -> Architecture:
    """Loads a model without its weights, to trace and compile what runs on it: configs and tokenizer are enough.

    Args:
        source, dtype, revision: as for `load_base_model`.

    Raises:
        InputError: as `load_base_model`.
    """
    name, _ = full_name(str(source), None)
    return read_architecture(find_layout(name, revision, weights=False), dtype)


def read_architecture(layout: Layout, dtype: jnp.dtype) -> Architecture:
    """Reads the architecture of a model on this machine.

    Args:
        layout: the model's folder or file.
        dtype: float32 or bfloat16.

    Raises:
        InputError: a config is missing, or asks for what cannot be run; the message names the file.
    """
    index = layout.index()
    names = ("text_encoder", "text_encoder_2") if "text_encoder_2" in index else ("text_encoder",)
    unet_module, vae_module = _unet(layout, dtype), _vae(layout, dtype)
    modules = {name: _text_encoder(layout, name, dtype) for name in names}
    vocabulary = layout.vocabulary("tokenizer")
    tokenizer = text.load_tokenizer(vocabulary.folder, modules["text_encoder"].config, vocabulary.padding)
    paddings: dict[str, int | None] = {"text_encoder": None}
    if "text_encoder_2" in modules:
        other = layout.vocabulary("tokenizer_2")
        second = text.load_tokenizer(other.folder, modules["text_encoder_2"].config, other.padding)
        if not second.has_words_of(tokenizer) or second.length != tokenizer.length:
            raise InputError(f"{other.folder}: its words are not those of {vocabulary.folder}")
        paddings["text_encoder_2"] = second.padding
    encoders = tuple(
        TextEncoder(name, module, len(modules) > 1, tokenizer.end, paddings[name]) for name, module in modules.items()
    )
    _check_fit(layout.path, unet_module, vae_module, encoders)
    initialisers: dict[str, Callable[[jax.Array], Params]] = {
        "unet": unet_module.init_weights,
        "vae": vae_module.init_weights,
        **{encoder.component: encoder.init_params for encoder in encoders},
    }
    shapes: dict[str, Params] = {}
    for component, initialise in initialisers.items():
        try:
            initial = jax.eval_shape(initialise, jax.random.key(0))
        except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
            raise InputError(f"{layout.config_name(component)}: no model can be built from it ({error!r})") from error
        shapes[component] = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), initial)
    scale = LatentScale.of(layout.config("vae"), vae_module.latent_channels, layout.config_name("vae"))
    schedule = NoiseSchedule.from_config(layout.config("scheduler"), layout.config_name("scheduler"))
    zero = bool(index.get("force_zeros_for_empty_prompt", len(names) > 1))  # as diffusers' pipelines do
    digest = hashlib.sha256(b"zero" * zero)
    for component in ("unet", "vae", *names, "scheduler"):
        digest.update(json.dumps(layout.config(component), sort_keys=True).encode())
    for file in text.tokenizer_files(vocabulary.folder):
        digest.update(file.read_bytes())
    digest.update(repr(paddings).encode())
    return Architecture(
        tokenizer=tokenizer,
        schedule=schedule,
        unet=unet_module,
        vae=vae_module,
        latent_scale=scale,
        text_encoders=encoders,
        shapes=shapes,
        empty_prompt_is_zero=zero,
        digest=digest.hexdigest(),
    )


def read_tokenizer(layout: Layout, encoder: TextEncoder) -> text.PromptTokenizer:
    """Reads the tokeniser that stands beside a text encoder.

    Raises:
        InputError: as `text.load_tokenizer`.
    """
    vocabulary = layout.vocabulary(encoder.tokenizer)
    return text.load_tokenizer(vocabulary.folder, encoder.module.config, vocabulary.padding)


def network_dtype(name: str = "auto") -> jnp.dtype:
    """The dtype for a network: `float32`, `bfloat16`, or with `auto` float32 on a CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _unet(layout: Layout, dtype: jnp.dtype) -> FlaxUNet2DConditionModel:
    file, config = layout.config_name("unet"), layout.config("unet", "UNet2DConditionModel", "FlaxUNet2DConditionModel")
    _check(file, config, _UNET_FIXED, _UNET_BLOCKS)
    addition = config.get("addition_embed_type")
    if addition not in _ADDITIONS:
        raise InputError(f"{file}: addition_embed_type = {addition!r} is not supported, only {_ADDITIONS}")
    # diffusers gives the number of heads as `attention_head_dim` unless `num_attention_heads` is set; its Flax
    # class knows the first alone.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    return _build(FlaxUNet2DConditionModel, {**config, "attention_head_dim": heads, "num_attention_heads": None}, dtype)


def _vae(layout: Layout, dtype: jnp.dtype) -> FlaxAutoencoderKL:
    config = layout.config("vae", "AutoencoderKL", "FlaxAutoencoderKL")
    _check(layout.config_name("vae"), config, _VAE_FIXED, _VAE_BLOCKS)
    return _build(FlaxAutoencoderKL, config, dtype)


def _text_encoder(
    layout: Layout, name: str, dtype: jnp.dtype
) -> FlaxCLIPTextModule | FlaxCLIPTextModelWithProjectionModule:
    config = layout.config(name, *_TEXT_CLASSES)
    module = next(_TEXT_CLASSES[name] for name in config["architectures"] if name in _TEXT_CLASSES)
    return module(CLIPTextConfig.from_dict(config), dtype=dtype)


def _check_fit(
    folder: Path, unet: FlaxUNet2DConditionModel, vae: FlaxAutoencoderKL, encoders: Sequence[TextEncoder]
) -> None:
    if unet.in_channels != vae.latent_channels:
        raise InputError(
            f"{folder}: the UNet takes {unet.in_channels} channels, the VAE gives {vae.latent_channels}: models for "
            "inpainting, depth or other extra inputs are not supported"
        )
    width = sum(encoder.width for encoder in encoders)
    if unet.cross_attention_dim != width:
        raise InputError(
            f"{folder}: the UNet reads encodings of width {unet.cross_attention_dim}, the text encoder's are {width} "
            "wide"
        )
    if not unet.addition_embed_type:
        return
    pooled = [encoder.pooled_width for encoder in encoders if encoder.pooled_width]
    if len(pooled) != 1:
        raise InputError(
            f"{folder}: the UNet reads one vector for a whole prompt; the text encoders give {len(pooled)}"
        )
    wanted = unet.projection_class_embeddings_input_dim - SIZES * unet.addition_time_embed_dim
    if wanted != pooled[0]:
        raise InputError(
            f"{folder}: the UNet reads a vector of {wanted} numbers for a whole prompt beside {SIZES} sizes; the text "
            f"encoder's has {pooled[0]}"
        )


def _check(file: str, config: Mapping[str, Any], fixed: Mapping[str, Any], blocks: set[str]) -> None:
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise InputError(f"{file}: {key} = {config[key]!r} is not supported, only {value!r}")
    unknown = {*config.get("down_block_types", ()), *config.get("up_block_types", ())} - blocks
    if unknown:
        raise InputError(f"{file}: blocks {sorted(unknown)} are not supported, only {sorted(blocks)}")


def _build(flax_class: type[nn.Module], config: Mapping[str, Any], dtype: jnp.dtype) -> Any:
    fields = {key: config[key] for key in flax_class.__dataclass_fields__ if key in config and key != "dtype"}
    return flax_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}, dtype=dtype)
