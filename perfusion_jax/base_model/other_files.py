"""What a single file is that no base model can be read from, and what to do with it: one line each."""

import re
from collections.abc import Mapping
from pathlib import Path

from perfusion_jax.base_model.original_layout import SECOND_TEXT_ENCODER, UNET, VAE
from perfusion_jax.base_model.tensor_headers import Header, Part
from perfusion_jax.runtime.errors import InputError

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# What files are called that hold weights.
SUFFIXES = (".safetensors", ".gguf", *_PICKLES)
_FLOATS = ("F64", "F32", "F16", "BF16")
_SUPPORTED = "supported are Stable Diffusion 1.x, 2.x and XL, and models fine-tuned from them"
_NAME_THE_MODEL = "name the base model instead"
_NO_FLOATS = "take the file whose weights are float16, bfloat16 or float32"

# What some name in a file tells of it, and what to do. The first that fits is said.
_TOLD_BY_NAMES = (
    (r"\.(absmax|quant_map|nested_absmax|quant_state\..+|SCB)$", f"quantised by bitsandbytes: {_NO_FLOATS}"),
    (r"\.scale_weight$|^scaled_fp8$", f"quantised to float8: {_NO_FLOATS}"),
    (
        r"^(lora|lycoris)_|\.lora_|_lora\.|\.lora\.|\.(hada|lokr)_w|\.oft_|\.dora_scale$",
        f"a LoRA, which only changes a base model: {_NAME_THE_MODEL}",
    ),
    (r"^(emb_params|string_to_param|clip_[lg]$)", f"an embedding of a word (textual inversion): {_NAME_THE_MODEL}"),
    (
        r"^control_model\.|^input_hint_block|^controlnet_|(^|\.)zero_convs\.|^control_",
        f"a ControlNet, which steers a base model: {_NAME_THE_MODEL}",
    ),
    (r"\.motion_modules\.", f"a motion module for video: {_NAME_THE_MODEL}"),
    (r"\.(time_stack|time_mixer)\.", f"a model for video: {_SUPPORTED}"),
    (r"(^|\.)joint_blocks\.", f"Stable Diffusion 3, which has no UNet: {_SUPPORTED}"),
    (r"(^|\.)double_blocks\.", f"FLUX or a relative, which has no UNet: {_SUPPORTED}"),
    (r"(^|\.)double_layers\.", f"AuraFlow, which has no UNet: {_SUPPORTED}"),
    (r"(^|\.)(adaln_single\.|scale_shift_table$|final_layer\.|adaLN_modulation)", f"a transformer: {_SUPPORTED}"),
    (r"^(clip_txt_mapper|down_blocks\.\d+\.\d+\.channelwise)\.", f"Stable Cascade: {_SUPPORTED}"),
    (r"^(noise_augmentor|embedder)\.", f"unCLIP, which makes pictures of pictures: {_SUPPORTED}"),
    (r"^edm_mean$", f"Playground 2.5, whose noise is of another kind: {_SUPPORTED}"),
    (r"^edm_vpred\.", f"CosXL, whose noise is of another kind: {_SUPPORTED}"),
)
_WHERE_PARTS_ARE = "take the whole model as one file, or the folder in the diffusers layout (with model_index.json)"
# Whose names begin so is one part of a model.
_PARTS = (
    (r"down_blocks\.\d+\.resnets\.|input_blocks\.", f"a UNet alone: {_WHERE_PARTS_ARE}"),
    (
        r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\.",
        "a VAE alone: name the model, and lay the VAE beside it as MODEL.vae.safetensors if it is to replace its own",
    ),
    (
        r"(text_model|cond_stage_model|conditioner)\.|transformer\.resblocks\.|encoder\.(layers|block)\.",
        f"a text encoder alone: {_WHERE_PARTS_ARE}",
    ),
)
# What a UNet reads beside noisy latents of 4 channels, by the channels of its input.
_OTHER_INPUTS = {5: "depth", 7: "upscaling", 8: "editing by instructions (pix2pix)", 9: "inpainting"}


def check_suffix(file: Path) -> None:
    """Sees that a file is one of weights without code.

    Raises:
        InputError: it is not there, or of a kind that is never read.
    """
    suffix = file.suffix.lower()
    if not file.exists():
        raise InputError(f"{file}: no such file")
    if suffix in _PICKLES:
        raise InputError(
            f"{file}: pickled weights can run code when read, and are never loaded; convert the file once, where you "
            'trust it and have PyTorch: python -c "import torch; from safetensors.torch import save_file; '
            f"w = torch.load('{file}', map_location='cpu', weights_only=True); w = w.get('state_dict', w); "
            "save_file({k: v.clone() for k, v in w.items() if torch.is_tensor(v)}, "
            f"'{file.with_suffix('.safetensors')}')\""
        )
    if suffix == ".gguf":
        raise InputError(f"{file}: weights quantised for llama.cpp: {_NO_FLOATS}, as .safetensors")
    if suffix != ".safetensors":
        raise InputError(f"{file}: not a .safetensors file; a model is one, or a folder in the diffusers layout")


def check_kind(header: Header) -> None:
    """Sees that a file is of no kind that looks like a model, and is none.

    Raises:
        InputError: it is something else, or a model that cannot be run.
    """
    if header.metadata.get("format", "").startswith("perfusion_jax concept"):
        raise InputError(f"{header.file}: a concept, which only changes a base model: {_NAME_THE_MODEL}")
    for pattern, what in _TOLD_BY_NAMES:
        if any(re.search(pattern, name) for name in header.tensors):
            raise InputError(f"{header.file}: {what}")
    if len(header.tensors) <= 2 and all(len(tensor.shape) <= 2 for tensor in header.tensors.values()):
        raise InputError(f"{header.file}: {len(header.tensors)} tensors, such as an embedding has: {_NAME_THE_MODEL}")


def check_parts(header: Header, prefixes: Mapping[str, str], other_vae: Path | None) -> None:
    """Sees that all parts of a model are in a file.

    Args:
        header: of the file.
        prefixes: by component, what the names of those that are there begin with.
        other_vae: a file with the VAE, if it is not to be in this one.

    Raises:
        InputError: the file holds other parts, or some of them.
    """
    if "unet" not in prefixes:
        for pattern, what in _PARTS:
            if any(re.match(pattern, name) for name in header.tensors):
                raise InputError(f"{header.file}: {what}")
        raise InputError(
            f"{header.file}: no name of its {len(header.tensors)} tensors begins with {UNET}: not a model in the "
            f"original layout; {_SUPPORTED}"
        )
    unet = header.tensors.get(f"{UNET}input_blocks.0.0.weight")
    channels = unet.shape[1] if unet and len(unet.shape) > 1 else 0
    if channels in _OTHER_INPUTS:
        raise InputError(
            f"{header.file}: a model for {_OTHER_INPUTS[channels]}, whose UNet takes {channels} channels: take the "
            "plain text-to-image model"
        )
    pooled = header.has(f"{UNET}label_emb.")
    if pooled and header.has("conditioner.embedders.0.model."):
        raise InputError(f"{header.file}: a refiner, which only finishes the pictures of another model: take that one")
    if "text_encoder" not in prefixes or (pooled and "text_encoder_2" not in prefixes):
        lacks = f"{SECOND_TEXT_ENCODER}*" if "text_encoder" in prefixes else "cond_stage_model.* or conditioner.*"
        parts = " and a VAE" if "vae" in prefixes else " alone"
        missing = "the second text encoder" if "text_encoder" in prefixes else "a text encoder"
        raise InputError(f"{header.file}: a UNet{parts}, without {missing} ({lacks}): {_WHERE_PARTS_ARE}")
    if "vae" not in prefixes and other_vae is None:
        raise InputError(
            f"{header.file}: it holds no VAE ({VAE}*): lay one beside it as {header.file.stem}.vae.safetensors"
        )


def check_dtypes(part: Part) -> None:
    """Sees that weights are numbers that are wide enough.

    Raises:
        InputError: they are quantised.
    """
    for name, tensor in part.tensors.items():
        if tensor.dtype not in _FLOATS:
            kind = "float8" if tensor.dtype.startswith("F8") else tensor.dtype
            raise InputError(f"{part.where}: {name} is {kind}; weights must be float16 or wider: {_NO_FLOATS}")
