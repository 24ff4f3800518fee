"""The original layout of Stable Diffusion (CompVis, Stability): one file with all parts, and names of its own.

Every function here maps the name that diffusers or transformers gives to a tensor to the original one. What is said of
shapes is in `deduction.py`.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perfusion_jax.base_model.weights import FlaxPath, opened_safetensors, to_flax_layout, torch_name

UNET = "model.diffusion_model."
VAE = "first_stage_model."
# Where text encoders lie: in SD 1 and 2, and in files of Stability's later code. The last ones are in the layout of
# transformers before it had `text_model`.
TEXT_ENCODERS = (
    "cond_stage_model.transformer.text_model.",
    "conditioner.embedders.0.transformer.text_model.",
    "cond_stage_model.model.",
    "conditioner.embedders.0.model.",
    "cond_stage_model.transformer.",
)
SECOND_TEXT_ENCODER = "conditioner.embedders.1.model."

# OpenCLIP's ViT-H has 24 layers. Stable Diffusion 2 reads the last but one, and diffusers leaves the last one out; so
# do files that were made from diffusers' folders.
LAYERS_READ = 23

# Tensors that no picture depends on: moving averages, tables of the noise schedule, and what training left behind.
_PASSED_OVER = re.compile(
    r"model_ema\.|embedding_manager\.|(first_stage_model\.)?loss\.|first_stage_model\.model_ema\.|denoiser\.|"
    r"(betas|alphas_cumprod|alphas_cumprod_prev|log_one_minus_alphas_cumprod|lvlb_weights|logvar|global_step)$|"
    r"(sqrt_|posterior_)\w+$|(v_pred|ztsnr)$|"
    r"(cond_stage_model|conditioner\.embedders\.\d)\.(.+\.)?(position_ids|logit_scale|attn_mask)$|"
    rf"cond_stage_model\.model\.(text_projection(\.weight)?$|transformer\.resblocks\.{LAYERS_READ}\.)|"
    rf"conditioner\.embedders\.0\.model\.(text_projection(\.weight)?$|transformer\.resblocks\.{LAYERS_READ}\.)|"
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection\.weight$"
)

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_QUERIES_KEYS_VALUES = ("q_proj", "k_proj", "v_proj")


def is_passed_over(name: str) -> bool:
    """Whether a tensor of that name in the file is not needed."""
    return _PASSED_OVER.match(name) is not None


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """Returns the original name of a UNet's tensor, without `UNET`, for a config in diffusers' words."""
    in_block = config["layers_per_block"] + 1  # of a block down with its sampler, or of a block up
    match name.split("."):
        case ["down_blocks", block, "downsamplers", _, _, leaf]:
            return f"input_blocks.{(int(block) + 1) * in_block}.0.op.{leaf}"
        case ["up_blocks", block, "upsamplers", _, _, leaf]:
            place = 2 if config["up_block_types"][int(block)].startswith("CrossAttn") else 1
            return f"output_blocks.{(int(block) + 1) * in_block - 1}.{place}.conv.{leaf}"
        case ["down_blocks", block, kind, layer, *rest]:
            place = 1 if kind == "attentions" else 0
            return f"input_blocks.{1 + int(block) * in_block + int(layer)}.{place}.{_unet_module(kind, rest)}"
        case ["up_blocks", block, kind, layer, *rest]:
            place = 1 if kind == "attentions" else 0
            return f"output_blocks.{int(block) * in_block + int(layer)}.{place}.{_unet_module(kind, rest)}"
        case ["mid_block", kind, layer, *rest]:
            place = 1 if kind == "attentions" else 2 * int(layer)
            return f"middle_block.{place}.{_unet_module(kind, rest)}"
    module, _, leaf = name.rpartition(".")
    return f"{_UNET_ENDS.get(module, module)}.{leaf}"


def _unet_module(kind: str, path: list[str]) -> str:
    module, *rest = path
    return ".".join([_UNET_RESNET.get(module, module) if kind == "resnets" else module, *rest])


def vae_name(name: str, config: Mapping[str, Any]) -> str:
    """Returns the original name of a VAE's tensor, without `VAE`, for a config in diffusers' words."""
    last = len(config["block_out_channels"]) - 1
    match name.split("."):
        case [side, "down_blocks", block, "resnets", layer, *rest]:
            return f"{side}.down.{block}.block.{layer}.{_vae_module(rest)}"
        case [side, "down_blocks", block, "downsamplers", _, *rest]:
            return f"{side}.down.{block}.downsample.{'.'.join(rest)}"
        case [side, "up_blocks", block, "resnets", layer, *rest]:  # which are counted from the end
            return f"{side}.up.{last - int(block)}.block.{layer}.{_vae_module(rest)}"
        case [side, "up_blocks", block, "upsamplers", _, *rest]:
            return f"{side}.up.{last - int(block)}.upsample.{'.'.join(rest)}"
        case [side, "mid_block", "resnets", layer, *rest]:
            return f"{side}.mid.block_{int(layer) + 1}.{_vae_module(rest)}"
        case [side, "mid_block", "attentions", _, module, leaf]:
            return f"{side}.mid.attn_1.{_VAE_ATTENTION.get(module, module)}.{leaf}"
        case [side, "conv_norm_out", leaf]:
            return f"{side}.norm_out.{leaf}"
    return name


def _vae_module(path: list[str]) -> str:
    return ".".join(path).replace("conv_shortcut", "nin_shortcut")


def clip_name(name: str) -> str:
    """Returns the original name of a tensor of OpenAI's CLIP, which is transformers' own."""
    return name.removeprefix("text_model.")


def open_clip_name(name: str) -> str:
    """Returns OpenCLIP's name of a tensor of a text encoder; three of transformers' tensors are parts of one there."""
    match name.split("."):
        case ["text_model", "encoder", "layers", layer, "self_attn", projection, leaf] if projection != "out_proj":
            return f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"
        case ["text_model", "encoder", "layers", layer, *rest]:
            *modules, leaf = rest
            module = ".".join(modules)
            return f"transformer.resblocks.{layer}.{_OPEN_CLIP_LAYER.get(module, module)}.{leaf}"
    return _OPEN_CLIP_ENDS.get(name, name)


def is_open_clip(names: Collection[str]) -> bool:
    """Whether a text encoder's tensors, named without a prefix, are in the layout of OpenCLIP, and not of OpenAI's."""
    return "positional_embedding" in names


def is_original_vae(names: Collection[str]) -> bool:
    """Whether a VAE's tensors, named without a prefix, are in the original layout, and not in that of diffusers."""
    return "encoder.norm_out.weight" in names


@dataclass(frozen=True)
class OriginalCheckpoint:
    """The tensors of one component in a file of the original layout; a `weights.Checkpoint`.

    Attributes:
        file: a safetensors file.
        prefix: what the names of the component begin with there.
        tensors: those names, without it; of tensors that are needed.
        rename: from the name that diffusers or transformers gives to a tensor to that of `tensors`.
    """

    file: Path
    prefix: str
    tensors: frozenset[str]
    rename: Callable[[str], str]

    def names(self) -> set[str]:
        """Returns the name of every tensor."""
        return {self.prefix + name for name in self.tensors}

    def find(self, path: FlaxPath) -> str | None:
        """Returns the name under which the file holds a Flax parameter, or None."""
        name = self.rename(torch_name(path))
        if name == "text_projection" and name not in self.tensors:
            name = "text_projection.weight"  # as other programs save it
        return self.prefix + name if name in self.tensors else None

    def read(self, name: str, path: FlaxPath, rank: int) -> np.ndarray:
        """Reads a tensor, in the layout of a Flax parameter of that path and rank."""
        with opened_safetensors(self.file) as opened:
            if "in_proj_" not in name:
                tensor = opened.get_tensor(name)
                # OpenCLIP multiplies by this matrix from the right, as Flax does, and as a linear layer does not.
                return tensor if name.endswith(".text_projection") else to_flax_layout(tensor, path, rank)
            fused = opened.get_slice(name)
            width = fused.get_shape()[0] // len(_QUERIES_KEYS_VALUES)
            start = _QUERIES_KEYS_VALUES.index(path[-2]) * width
            return to_flax_layout(fused[start : start + width], path, rank)
