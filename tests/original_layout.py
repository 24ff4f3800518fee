"""Models of random weights in the original layout, one file each, made from PyTorch's diffusers and transformers.

The names are written down from the original code (ldm, sgm, OpenCLIP), in the direction from diffusers to the original.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from checkpoints import randomise
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from perfusion_jax.runtime.shipped import CLIP_VOCABULARY

State = dict[str, torch.Tensor]
Modules = dict[str, torch.nn.Module]

_RESIDUAL = [
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
]


def _moved(state: State, old: str, new: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Takes the tensors whose names begin with `old` out, and gives them with `new` in its place."""
    for name in [name for name in state if name.startswith(old)]:
        yield new + name.removeprefix(old), state.pop(name)


def original_unet(unet: UNet2DConditionModel) -> State:
    state, result = dict(unet.state_dict()), {}

    def residual(old: str, new: str) -> None:
        for here, there in _RESIDUAL:
            result.update(_moved(state, old + here, new + there))

    def module(old: str, new: str) -> None:
        result.update(_moved(state, old, new))

    module("conv_in.", "input_blocks.0.0.")
    module("time_embedding.linear_1.", "time_embed.0.")
    module("time_embedding.linear_2.", "time_embed.2.")
    module("add_embedding.linear_1.", "label_emb.0.0.")
    module("add_embedding.linear_2.", "label_emb.0.2.")
    place = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            residual(f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{place}.0.")
            module(f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{place}.1.")
            place += 1
        if block.downsamplers:
            module(f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{place}.0.op.")
            place += 1
    residual("mid_block.resnets.0.", "middle_block.0.")
    module("mid_block.attentions.0.", "middle_block.1.")
    residual("mid_block.resnets.1.", "middle_block.2.")
    place = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            residual(f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{place}.0.")
            module(f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{place}.1.")
            place += 1
        after = 2 if hasattr(block, "attentions") else 1  # the last module of the block's last entry
        module(f"up_blocks.{i}.upsamplers.0.conv.", f"output_blocks.{place - 1}.{after}.conv.")
    module("conv_norm_out.", "out.0.")
    module("conv_out.", "out.2.")
    assert not state
    return result


def original_vae(vae: AutoencoderKL) -> State:
    state, result = dict(vae.state_dict()), {}

    def module(old: str, new: str) -> None:
        for name, tensor in _moved(state, old, new):
            result[name.replace("conv_shortcut", "nin_shortcut")] = tensor

    last = len(vae.config.block_out_channels) - 1
    for i in range(last + 1):
        for j in range(vae.config.layers_per_block):
            module(f"encoder.down_blocks.{i}.resnets.{j}.", f"encoder.down.{i}.block.{j}.")
        module(f"encoder.down_blocks.{i}.downsamplers.0.", f"encoder.down.{i}.downsample.")
        for j in range(vae.config.layers_per_block + 1):
            module(f"decoder.up_blocks.{i}.resnets.{j}.", f"decoder.up.{last - i}.block.{j}.")
        module(f"decoder.up_blocks.{i}.upsamplers.0.", f"decoder.up.{last - i}.upsample.")
    for side in ("encoder", "decoder"):
        module(f"{side}.mid_block.resnets.0.", f"{side}.mid.block_1.")
        module(f"{side}.mid_block.resnets.1.", f"{side}.mid.block_2.")
        module(f"{side}.mid_block.attentions.0.group_norm.", f"{side}.mid.attn_1.norm.")
        for old, new in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            module(f"{side}.mid_block.attentions.0.{old}.", f"{side}.mid.attn_1.{new}.")
        module(f"{side}.conv_in.", f"{side}.conv_in.")
        module(f"{side}.conv_norm_out.", f"{side}.norm_out.")
        module(f"{side}.conv_out.", f"{side}.conv_out.")
    module("quant_conv.", "quant_conv.")
    module("post_quant_conv.", "post_quant_conv.")
    assert not state
    for name, tensor in result.items():
        if ".attn_1." in name and tensor.ndim == 2:  # 1x1 convolutions
            result[name] = tensor[:, :, None, None]
    return result


def open_clip(text_encoder: torch.nn.Module) -> State:
    state, result = dict(text_encoder.state_dict()), {}
    result["token_embedding.weight"] = state.pop("text_model.embeddings.token_embedding.weight")
    result["positional_embedding"] = state.pop("text_model.embeddings.position_embedding.weight")
    for i in range(text_encoder.config.num_hidden_layers):
        old, new = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for leaf in ("weight", "bias"):
            fused = [state.pop(f"{old}self_attn.{projection}_proj.{leaf}") for projection in "qkv"]
            result[f"{new}attn.in_proj_{leaf}"] = torch.cat(fused)
        result.update(_moved(state, f"{old}self_attn.out_proj.", f"{new}attn.out_proj."))
        result.update(_moved(state, f"{old}layer_norm1.", f"{new}ln_1."))
        result.update(_moved(state, f"{old}layer_norm2.", f"{new}ln_2."))
        result.update(_moved(state, f"{old}mlp.fc1.", f"{new}mlp.c_fc."))
        result.update(_moved(state, f"{old}mlp.fc2.", f"{new}mlp.c_proj."))
    result.update(_moved(state, "text_model.final_layer_norm.", "ln_final."))
    if "text_projection.weight" in state:
        result["text_projection"] = state.pop("text_projection.weight").T
    assert not state
    return result


def _prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def original_state(modules: Modules) -> State:
    """All tensors of a model as its published file has them, those included that nobody reads."""
    state = {
        **_prefixed("model.diffusion_model.", original_unet(modules["unet"])),
        **_prefixed("first_stage_model.", original_vae(modules["vae"])),
        "model_ema.decay": torch.tensor(0.9999),
        "betas": torch.ones(1000),
        "alphas_cumprod": torch.ones(1000),
        "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
    }
    text_encoder = modules["text_encoder"]
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    if "text_encoder_2" in modules:
        state |= _prefixed("conditioner.embedders.0.transformer.", {**text_encoder.state_dict(), **positions})
        state |= _prefixed("conditioner.embedders.1.model.", open_clip(modules["text_encoder_2"]))
        state["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    elif text_encoder.config.hidden_act == "gelu":
        width = text_encoder.config.hidden_size
        tensors = open_clip(text_encoder)
        last = "transformer.resblocks.22."
        unread = {n.replace(last, "transformer.resblocks.23."): t + 1 for n, t in tensors.items() if n.startswith(last)}
        state |= _prefixed("cond_stage_model.model.", {**tensors, **unread})
        state["cond_stage_model.model.text_projection"] = torch.ones(width, width)
        state["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    else:
        state |= _prefixed("cond_stage_model.transformer.", {**text_encoder.state_dict(), **positions})
    return state


UNETS = {
    "sd1": {
        "sample_size": 64,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
    },
    "sd2": {
        "sample_size": 96,
        "block_out_channels": (64, 128),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 192,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 96 + 6 * 8,
    },
}
_VELOCITY = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SCHEDULERS = {
    "sd1": {"_class_name": "PNDMScheduler", "prediction_type": "epsilon", "clip_sample": False},
    "sd2": {**_VELOCITY, "clip_sample": False},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading"},
}


def _text_config(width: int, layers: int, activation: str, **more: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=width + 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,
        **more,
    )


def make_modules(layout: str) -> Modules:
    """A small model of random weights, with the vocabulary of CLIP: `sd1`, `sd2` (23 text layers) or `sdxl`."""
    is_xl = layout == "sdxl"
    modules: Modules = {
        "unet": UNet2DConditionModel(**UNETS[layout]),
        "vae": AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=8 * UNETS[layout]["sample_size"],
            scaling_factor=0.13025 if is_xl else 0.18215,
            force_upcast=is_xl,
        ),
        "text_encoder": CLIPTextModel(
            _text_config(64, 23, "gelu") if layout == "sd2" else _text_config(64, 2, "quick_gelu")
        ),
    }
    if is_xl:
        modules["text_encoder_2"] = CLIPTextModelWithProjection(_text_config(128, 2, "gelu", projection_dim=96))
    for seed, module in enumerate(modules.values()):
        randomise(module, seed)
    if layout == "sd2":  # whose UNet is known by this to predict the velocity
        bias = modules["unet"].up_blocks[-1].attentions[-1].transformer_blocks[0].norm1.bias
        torch.nn.init.constant_(bias, 0.1)
        torch.nn.init.constant_(bias[::2], -0.1)
    return modules


def save_folder(folder: Path, layout: str, modules: Modules) -> Path:
    """Saves a model in the layout of diffusers."""
    index = {"_class_name": "StableDiffusionXLPipeline" if layout == "sdxl" else "StableDiffusionPipeline"}
    for name, module in modules.items():
        module.save_pretrained(folder / name)
        index[name] = [type(module).__module__.split(".")[0], type(module).__name__]
    tokenizers = {"tokenizer": "!" if layout == "sd2" else "<|endoftext|>"}
    if layout == "sdxl":
        tokenizers["tokenizer_2"] = "!"
        index["force_zeros_for_empty_prompt"] = True
    for name, padding in tokenizers.items():
        CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, pad_token=padding).save_pretrained(folder / name)
        index[name] = ["transformers", "CLIPTokenizer"]
    scheduler = {
        **SCHEDULERS[layout],
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_original(file: Path, state: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Writes tensors to a file, as the original programs do."""
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, file, metadata)
    return file
