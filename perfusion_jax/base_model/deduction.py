"""The configs of a model in the original layout, deduced from the names and shapes of its tensors alone.

The configs are in the words of diffusers and transformers, as the published models have them.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from perfusion_jax.base_model.original_layout import is_open_clip, is_original_vae
from perfusion_jax.base_model.tensor_headers import Part
from perfusion_jax.base_model.unet import SIZES
from perfusion_jax.runtime.errors import InputError

Config = dict[str, Any]

# What shapes do not tell, from the published configs: the side of training pictures in pixels, pixels of a latent, the
# factor of latents, and attention heads. UNets with linear layers around attention have heads of 64 channels; those
# with convolutions there, which came before, have 8 heads everywhere.
_SIDE = 512
_SIDE_OF_VELOCITY = 768
_SIDE_OF_XL = 1024
_PIXELS = 8
_SCALING_FACTOR = 0.18215
_SCALING_FACTOR_OF_XL = 0.13025
_HEADS = 8
_HEAD_CHANNELS = 64


class Prediction(NamedTuple):
    """What a UNet was trained to predict, and on what noise.

    Attributes:
        velocity: the velocity, and not the noise.
        zero_snr: the last timestep is pure noise (arXiv 2305.08891).
    """

    velocity: bool = False
    zero_snr: bool = False


def deduce_configs(parts: Mapping[str, Part], prediction: Prediction) -> dict[str, Config]:
    """Deduces the config of every component.

    Args:
        parts: `unet`, `vae`, `text_encoder`, and for XL `text_encoder_2`.
        prediction: of the UNet.

    Returns:
        The configs of these, and of `scheduler`.

    Raises:
        InputError: a tensor is missing, or the UNet is built as none that diffusers' Flax classes can run.
    """
    texts = {
        name: deduce_text_encoder(part, projects=name == "text_encoder_2")
        for name, part in parts.items()
        if name.startswith("text_encoder")
    }
    unet = deduce_unet(parts["unet"], texts.get("text_encoder_2"))
    vae = deduce_vae(parts["vae"])
    if "text_encoder_2" in texts:
        side = _SIDE_OF_XL
        vae |= {"scaling_factor": _SCALING_FACTOR_OF_XL, "force_upcast": True}
    else:
        side = _SIDE_OF_VELOCITY if prediction.velocity and unet["use_linear_projection"] else _SIDE
        vae["scaling_factor"] = _SCALING_FACTOR
    return {
        "unet": {**unet, "sample_size": side // _PIXELS},
        "vae": {**vae, "sample_size": side},
        **texts,
        "scheduler": _scheduler(prediction, is_xl="text_encoder_2" in texts),
    }


def _scheduler(prediction: Prediction, is_xl: bool) -> Config:
    config: Config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if prediction.velocity else "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    if is_xl:
        config |= {
            "_class_name": "EulerDiscreteScheduler",
            "interpolation_type": "linear",
            "timestep_spacing": "leading",
        }
    else:
        config |= {"_class_name": "DDIMScheduler" if prediction.velocity else "PNDMScheduler", "clip_sample": False}
    if prediction.zero_snr:  # where the last timestep was trained on, drawing starts there (section 3.3)
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def deduce_unet(part: Part, pooling: Config | None) -> Config:
    """Deduces a UNet's config, all of it but `sample_size`.

    Args:
        part: the UNet.
        pooling: the config of the text encoder that gives a vector for the whole prompt, if there is one.

    Raises:
        InputError: a tensor is missing, or blocks or layers differ from each other as no config can say.
    """
    inputs, outputs = part.count(r"input_blocks\.(\d+)\."), part.count(r"output_blocks\.(\d+)\.")
    downs = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in part.tensors]
    layers = (downs[0] if downs else inputs) - 1  # the first of the inputs is a convolution
    num_blocks = len(downs) + 1
    firsts = [1 + block * (layers + 1) for block in range(num_blocks)]
    widths = [part.shape(f"input_blocks.{first}.0.out_layers.3.weight", 4)[0] for first in firsts]
    down = [[_depth(part, f"input_blocks.{first + layer}") for layer in range(layers)] for first in firsts]
    up = [[_depth(part, f"output_blocks.{b * (layers + 1) + i}") for i in range(layers + 1)] for b in range(num_blocks)]
    middle = _depth(part, "middle_block")
    depths = [block[0] if layers else 0 for block in down]
    regular = (
        layers > 0
        and (inputs, outputs) == (num_blocks * (layers + 1), num_blocks * (layers + 1))
        and down == [[depth] * layers for depth in depths]
        and up == [[depth] * (layers + 1) for depth in reversed(depths)]
        and middle > 0
        and depths[-1] in (0, middle)
    )
    if not regular:
        raise InputError(
            f"{part.where}: its attention has {down} layers in the blocks down, {middle} in the middle, {up} in the "
            "blocks up: no UNet of Stable Diffusion 1, 2 or XL; perhaps a distilled one, and these are not supported"
        )
    context = part.shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    linear = has_linear_projections(part)
    per_block = [depth or 1 for depth in depths[:-1]] + [middle]
    has_attention = [depth > 0 for depth in depths]
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [max(width // _HEAD_CHANNELS, 1) for width in widths] if linear else _HEADS,
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_attention],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": part.shape("input_blocks.0.0.weight", 4)[1],
        "layers_per_block": layers,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": part.shape("out.2.weight", 4)[0],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)],
        "use_linear_projection": linear,
    }
    if set(per_block) != {1}:
        config["transformer_layers_per_block"] = per_block
    if pooling:
        added = part.shape("label_emb.0.0.weight", 2)[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (added - pooling["projection_dim"]) // SIZES,
            "projection_class_embeddings_input_dim": added,
        }
    return config


def has_linear_projections(unet: Part) -> bool:
    """Whether a UNet's attention is between linear layers, as since Stable Diffusion 2, and not convolutions."""
    projection = unet.tensors.get("middle_block.1.proj_in.weight")
    return projection is not None and len(projection.shape) == 2


def _depth(part: Part, block: str) -> int:
    return part.count(rf"{re.escape(block)}\.1\.transformer_blocks\.(\d+)\.")


def deduce_vae(part: Part) -> Config:
    """Deduces a VAE's config, in the original or in diffusers' layout, but for the scale of its latents.

    Raises:
        InputError: a tensor is missing.
    """
    down, layer, attention = (
        ("down", "block", "mid.attn_1.")
        if is_original_vae(part.tensors)
        else ("down_blocks", "resnets", "mid_block.attentions.0.")
    )
    blocks = part.count(rf"encoder\.{down}\.(\d+)\.")
    widths = [part.shape(f"encoder.{down}.{block}.{layer}.0.conv1.weight", 4)[0] for block in range(blocks)]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "in_channels": part.shape("encoder.conv_in.weight", 4)[1],
        "latent_channels": part.shape("decoder.conv_in.weight", 4)[1],
        "layers_per_block": part.count(rf"encoder\.{down}\.0\.{layer}\.(\d+)\."),
        "mid_block_add_attention": any(name.startswith(f"encoder.{attention}") for name in part.tensors),
        "norm_num_groups": 32,
        "out_channels": part.shape("decoder.conv_out.weight", 4)[0],
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "use_post_quant_conv": "post_quant_conv.weight" in part.tensors,
        "use_quant_conv": "quant_conv.weight" in part.tensors,
    }


def deduce_text_encoder(part: Part, projects: bool) -> Config:
    """Deduces the config of a text encoder in the layout of OpenAI's CLIP (as transformers has it) or of OpenCLIP.

    Args:
        part: the text encoder.
        projects: whether it gives a vector for the whole prompt.

    Raises:
        InputError: a tensor is missing.
    """
    if is_open_clip(part.tensors):
        words, positions = "token_embedding.weight", "positional_embedding"
        layers, hidden = "transformer.resblocks", "mlp.c_fc.weight"
    else:
        words, positions = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
        layers, hidden = "encoder.layers", "mlp.fc1.weight"
    vocabulary, width = part.shape(words, 2)
    config = {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 0,
        "eos_token_id": 2,  # as the published ones say; it stands for "where the id is largest"
        "hidden_act": "gelu" if is_open_clip(part.tensors) else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": part.shape(f"{layers}.0.{hidden}", 2)[0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": part.shape(positions, 2)[0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(width // _HEAD_CHANNELS, 1),
        "num_hidden_layers": part.count(rf"{re.escape(layers)}\.(\d+)\."),
        "pad_token_id": 1,
        "vocab_size": vocabulary,
    }
    if projects:
        transposed = "text_projection.weight" in part.tensors  # as other programs save it
        shape = part.shape("text_projection.weight" if transposed else "text_projection", 2)
        config |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": shape[0 if transposed else 1]}
    return config
