"""`load_base_model`: a frozen text-to-image model, ready to be called."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
    FlaxCLIPTextModule,
    FlaxUNet2DConditionModel,
)
from perfusion_jax.base_model.schedule import NoiseSchedule
from perfusion_jax.base_model.source import find_folder, read_config
from perfusion_jax.base_model.unet import KeysValues
from perfusion_jax.base_model.vae import LatentDistribution
from perfusion_jax.base_model.weights import find_checkpoint, read_tree
from perfusion_jax.method.concept import Concept
from perfusion_jax.method.surgery import Params, cross_attention_layers
from perfusion_jax.runtime.errors import InputError

# What the Flax classes compute whatever the config says: a config that asks for something else cannot be run.
_UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
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
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_UNET_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
# Rounding the weights to bfloat16 moves a fingerprint by 0.01 at most. That of another model differs by about 1,
# that of a fine-tune by about the relative change of the weights: one within 2 % counts as the same model.
FINGERPRINT_TOLERANCE = 0.02
# A folder may hold C beside the diffusers layout, which passes over it.
COVARIANCE = "covariance.npz"
_VAE_BLOCKS = {"DownEncoderBlock2D", "UpDecoderBlock2D"}


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen text-to-image model in the layout of Stable Diffusion.

    The methods are pure functions of their array arguments, weights among them, so they can be jitted,
    differentiated and mapped: pass `model.params[...]`, or an edited tree, as an argument rather than closing over it.

    Attributes:
        name: what it was loaded from.
        params: weights by component: `unet`, `vae`, `text_encoder`.
        tokenizer: prompts to token ids.
        schedule: the noise schedule.
        unet, vae, text_encoder: the architectures.
        covariance: the file of C that came with the checkpoint, if one did.
    """

    name: str
    params: dict[str, Params]
    tokenizer: text.PromptTokenizer
    schedule: NoiseSchedule
    unet: FlaxUNet2DConditionModel
    vae: FlaxAutoencoderKL
    text_encoder: FlaxCLIPTextModule
    covariance: Path | None = None

    @property
    def context_width(self) -> int:
        """Width of a text encoding, d_ctx: 768 for Stable Diffusion 1."""
        return self.unet.cross_attention_dim

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 4 for Stable Diffusion."""
        return self.vae.latent_channels

    @property
    def vae_factor(self) -> int:
        """Pixels of a picture per latent, in each direction: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.block_out_channels) - 1)

    def encode(
        self, text_params: Params, ids: jax.Array | np.ndarray, concept_embeddings: jax.Array | None = None
    ) -> jax.Array:
        """Encodes tokenised prompts, [batch, tokens, context_width]; see `text.encode`."""
        return text.encode(self.text_encoder, text_params, jnp.asarray(ids), concept_embeddings)

    def denoise(
        self, unet_params: Params, latents: jax.Array, timesteps: jax.Array, keys_values: KeysValues
    ) -> jax.Array:
        """Runs the UNet on given keys and values; see `unet.denoise`."""
        return unet.denoise(self.unet, unet_params, latents, timesteps, keys_values)

    def attention_maps(
        self, unet_params: Params, latents: jax.Array, timesteps: jax.Array, keys_values: KeysValues
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the UNet and tells where it looks at which token; see `unet.attention_maps`."""
        return unet.attention_maps(self.unet, unet_params, latents, timesteps, keys_values)

    def encode_image(self, vae_params: Params, images: jax.Array) -> LatentDistribution:
        """Encodes pictures in [-1, 1], [batch, height, width, 3]; see `vae.encode_image`."""
        return vae.encode_image(self.vae, vae_params, images)

    def decode_latent(self, vae_params: Params, latents: jax.Array) -> jax.Array:
        """Decodes latents to pictures, [batch, height, width, 3]; see `vae.decode_latent`."""
        return vae.decode_latent(self.vae, vae_params, latents)

    def super_category_embedding(self, super_category: str) -> jax.Array:
        """Returns the word embedding of a super-category, the mean over its tokens, float32 [token_width].

        Encoding a prompt with it in place of a concept's gives the super-category's encodings, every word where it was.

        Raises:
            InputError: an empty super-category.
        """
        table = self.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
        return table[np.array(self.tokenizer.words(super_category))].astype(jnp.float32).mean(axis=0)

    def new_concept(
        self, super_category: str, whitening: jax.Array, templates: Sequence[str] = ("a photo of a {}",)
    ) -> Concept:
        """Returns a concept that is still its super-category in every way.

        Args:
            super_category: the word or words for this kind of thing, such as `dog` or `teddy bear`.
            whitening: C^-1/2 of this model's text encoder (`load_whitening`), float32 [context_width, context_width].
            templates: prompts with one `{}`; the super-category's encoding is the mean over them and over its tokens.

        Raises:
            InputError: an empty super-category, no template or one without a slot, or a matrix of another width.
        """
        if not templates:
            raise InputError("no templates: give at least one prompt with a {}")
        if whitening.shape != (self.context_width, self.context_width):
            raise InputError(
                f"the whitening matrix is {whitening.shape}; this text encoder's width is {self.context_width}"
            )
        located = [self.tokenizer.locate(template, super_category) for template in templates]
        encodings = [_encode(self, self.params["text_encoder"], ids[None]) for ids, _ in located]
        masks = np.stack([mask for _, mask in located])
        return Concept.from_super_category(
            projections=cross_attention_layers(self.params["unet"]),
            embedding=self.super_category_embedding(super_category),
            encoding=text.mean_at(jnp.concatenate(encodings), jnp.asarray(masks)),
            whitening=whitening,
        )

    def new_concept_shapes(self) -> Concept:
        """Returns the shapes and dtypes of this model's concepts: a Concept of `jax.ShapeDtypeStruct`."""
        width = self.context_width
        return jax.eval_shape(
            Concept.from_super_category,
            cross_attention_layers(self.params["unet"]),
            jax.ShapeDtypeStruct((self.text_encoder.config.hidden_size,), jnp.float32),
            jax.ShapeDtypeStruct((width,), jnp.float32),
            jax.ShapeDtypeStruct((width, width), jnp.float32),
        )

    @cached_property
    def fingerprint(self) -> tuple[float, ...]:
        """A few numbers per cross-attention kernel by which a concept knows its model, whatever the weights' dtype.

        Each kernel W [d_ctx, d_out] gives x^T W y / rms(W) for fixed unit vectors x and y: about standard normal
        between models, and equal to some thousandths between the float32, float16 and bfloat16 weights of one.
        """
        return tuple(
            round(float(_probe(weights[projection]["kernel"])), 4)
            for _, weights in sorted(cross_attention_layers(self.params["unet"]).items())
            for projection in ("to_k", "to_v")
        )

    def has_fingerprint(self, fingerprint: Sequence[float]) -> bool:
        """Whether a fingerprint is this model's."""
        ours = self.fingerprint
        return len(ours) == len(fingerprint) and np.allclose(ours, fingerprint, rtol=0, atol=FINGERPRINT_TOLERANCE)

    def astype(self, dtype: jnp.dtype) -> "BaseModel":
        """Returns the model with weights and computation in another float dtype."""
        return replace(
            self,
            params=jax.tree.map(lambda leaf: leaf.astype(dtype), self.params),
            **{name: getattr(self, name).clone(dtype=dtype) for name in ("unet", "vae", "text_encoder")},
        )


# Compiled once, however many templates a concept has.
_encode = jax.jit(BaseModel.encode, static_argnums=0)


def network_dtype(name: str = "auto") -> jnp.dtype:
    """The dtype for a network: `float32`, `bfloat16`, or with `auto` float32 on a CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _probe(kernel: jax.Array) -> jax.Array:
    exact = kernel.astype(jnp.float32)
    x, y = (np.cos(np.arange(size) * np.sqrt(2)) for size in exact.shape)
    x, y = (jnp.asarray(vector / np.linalg.norm(vector), jnp.float32) for vector in (x, y))
    probed = jnp.einsum("i,io,o->", x, exact, y, precision=jax.lax.Precision.HIGHEST)
    return probed / jnp.sqrt(jnp.mean(exact**2))


def load_base_model(
    source: str | Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> BaseModel:
    """Loads a frozen text-to-image model. PyTorch is not needed, and no pickle is ever read.

    Args:
        source: a folder in the diffusers layout, or a hub id (downloaded once, then read from the cache, without a
            network too).
        dtype: float32 or bfloat16, of the weights and of the computation.
        revision: branch, tag or commit of a hub id.
        variant: `fp16` for the weight files of that variant.

    Raises:
        InputError: it cannot be found, read, or run; the message names the file.
        UnavailableError: storage or the hub fails.
    """
    folder = find_folder(str(source), revision, variant)
    base = _architecture(str(source), folder, dtype)
    params: dict[str, Params] = {}
    for component, shapes in base.params.items():
        checkpoint = find_checkpoint(folder / component, variant)
        params[component] = read_tree(checkpoint, shapes, dtype, str(folder / component))
    return replace(base, params=params)


def load_architecture(source: str | Path, *, dtype: jnp.dtype = jnp.float32, revision: str | None = None) -> BaseModel:
    """Loads a model without its weights, to trace and compile what runs on it: configs and tokenizer are enough.

    Args:
        source, dtype, revision: as for `load_base_model`.

    Returns:
        The model; its `params` are of `jax.ShapeDtypeStruct`.

    Raises:
        InputError: as `load_base_model`.
    """
    return _architecture(str(source), find_folder(str(source), revision, weights=False), dtype)


def _architecture(source: str, folder: Path, dtype: jnp.dtype) -> BaseModel:
    unet_module, vae_module, text_module = (
        _unet(folder / "unet" / "config.json", dtype),
        _vae(folder / "vae" / "config.json", dtype),
        _text_encoder(folder / "text_encoder" / "config.json", dtype),
    )
    initialisers: dict[str, Callable[[jax.Array], Params]] = {
        "unet": unet_module.init_weights,
        "vae": vae_module.init_weights,
        "text_encoder": partial(_initial_text_params, text_module),
    }
    _check_fit(folder, unet_module, vae_module, text_module)
    tokenizer = text.load_tokenizer(folder / "tokenizer", text_module.config)
    params: dict[str, Params] = {}
    for component, initialise in initialisers.items():
        try:
            shapes = jax.eval_shape(initialise, jax.random.key(0))
        except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
            raise InputError(
                f"{folder / component / 'config.json'}: no model can be built from it ({error!r})"
            ) from error
        params[component] = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return BaseModel(
        name=source,
        params=params,
        tokenizer=tokenizer,
        schedule=NoiseSchedule.from_config(read_config(scheduler), str(scheduler)),
        unet=unet_module,
        vae=vae_module,
        text_encoder=text_module,
        covariance=covariance if (covariance := folder / COVARIANCE).is_file() else None,
    )


def _unet(file: Path, dtype: jnp.dtype) -> FlaxUNet2DConditionModel:
    config = read_config(file, "UNet2DConditionModel", "FlaxUNet2DConditionModel")
    _check(file, config, _UNET_FIXED, _UNET_BLOCKS)
    # diffusers gives the number of heads as `attention_head_dim` unless `num_attention_heads` is set; its Flax
    # class knows the first alone.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    return _build(FlaxUNet2DConditionModel, {**config, "attention_head_dim": heads, "num_attention_heads": None}, dtype)


def _vae(file: Path, dtype: jnp.dtype) -> FlaxAutoencoderKL:
    config = read_config(file, "AutoencoderKL", "FlaxAutoencoderKL")
    _check(file, config, _VAE_FIXED, _VAE_BLOCKS)
    return _build(FlaxAutoencoderKL, config, dtype)


def _text_encoder(file: Path, dtype: jnp.dtype) -> FlaxCLIPTextModule:
    config = read_config(file, "CLIPTextModel", "FlaxCLIPTextModel")
    return FlaxCLIPTextModule(CLIPTextConfig.from_dict(config), dtype=dtype)


def _initial_text_params(module: FlaxCLIPTextModule, key: jax.Array) -> Params:
    ids = jnp.zeros((1, module.config.max_position_embeddings), jnp.int32)
    return module.init(key, ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None])["params"]


def _check_fit(
    folder: Path, unet: FlaxUNet2DConditionModel, vae: FlaxAutoencoderKL, text_encoder: FlaxCLIPTextModule
) -> None:
    if unet.in_channels != vae.latent_channels:
        raise InputError(
            f"{folder}: the UNet takes {unet.in_channels} channels, the VAE gives {vae.latent_channels}: models for "
            "inpainting, depth or other extra inputs are not supported"
        )
    if unet.cross_attention_dim != text_encoder.config.hidden_size:
        raise InputError(
            f"{folder}: the UNet reads encodings of width {unet.cross_attention_dim}, the text encoder's are "
            f"{text_encoder.config.hidden_size} wide"
        )


def _check(file: Path, config: Mapping[str, Any], fixed: Mapping[str, Any], blocks: set[str]) -> None:
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise InputError(f"{file}: {key} = {config[key]!r} is not supported, only {value!r}")
    unknown = {*config.get("down_block_types", ()), *config.get("up_block_types", ())} - blocks
    if unknown:
        raise InputError(f"{file}: blocks {sorted(unknown)} are not supported, only {sorted(blocks)}")


def _build(flax_class: type[nn.Module], config: Mapping[str, Any], dtype: jnp.dtype) -> Any:
    fields = {key: config[key] for key in flax_class.__dataclass_fields__ if key in config and key != "dtype"}
    return flax_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}, dtype=dtype)
