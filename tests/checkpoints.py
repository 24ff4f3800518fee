"""Stable-Diffusion-layout folders of random weights, made by PyTorch diffusers and transformers, the oracles."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from perfusion_jax.runtime.shipped import CLIP_VOCABULARY

WORDS = ["a", "photo", "of", "the", "dog", "cat", "teddy", "bear", "on", "beach", "in", "snow", "and", "my", ",", "."]
PROMPT_LENGTH = 16
# Of the pictures that a CLIPSeg takes.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# `unet` and `text` of each layout; sizes apart, the layouts differ in these keys. `text_2` is a second text encoder;
# `crossing` says which blocks have cross-attention, from the outside in.
LAYOUTS = {
    "sd1": {
        "unet": {"attention_head_dim": 4, "use_linear_projection": False, "cross_attention_dim": 48},
        "text": {"hidden_act": "quick_gelu", "hidden_size": 48},
        "prediction_type": "epsilon",
    },
    "sd2": {
        "unet": {"attention_head_dim": [1, 2, 4], "use_linear_projection": True, "cross_attention_dim": 64},
        "text": {"hidden_act": "gelu", "hidden_size": 64},
        "prediction_type": "v_prediction",
    },
    "sdxl": {
        "unet": {
            "attention_head_dim": [1, 2, 4],
            "use_linear_projection": True,
            "cross_attention_dim": 48 + 64,
            "transformer_layers_per_block": [1, 2, 1],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 40,
        },
        "text": {"hidden_act": "quick_gelu", "hidden_size": 48},
        # Published configs say eos_token_id = 2, whatever the tokeniser's is.
        "text_2": {"hidden_act": "gelu", "hidden_size": 64, "projection_dim": 40, "eos_token_id": 2},
        "prediction_type": "epsilon",
        "crossing": (False, True, True),
        "index": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    },
}


def save_tokenizer(folder: Path, length: int = PROMPT_LENGTH, **options) -> CLIPTokenizer:
    """A CLIP tokeniser in which every word of WORDS is one token, and others are spelled letter by letter.

    `options` are those of the tokeniser, such as `pad_token`.
    """
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [",", "."]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merge = (pieces[0], pieces[1])
            if merge not in merges:
                merges.append(merge)
            pieces = ["".join(merge), *pieces[2:]]
            if pieces[0] not in vocabulary:
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    tokenizer = CLIPTokenizer(folder / "vocab.json", folder / "merges.txt", model_max_length=length, **options)
    tokenizer.save_pretrained(folder)
    return tokenizer


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Gives every parameter a value that matters: at 0 and 1, where biases and norms start, mistakes do not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval()


def save_checkpoint(folder: Path, layout: str, large: bool = False, small: bool = False, **save_options) -> Path:
    """Saves a small checkpoint of random weights and returns its folder.

    Args:
        folder: where.
        layout: a key of LAYOUTS.
        large: with a UNet of many more layers, each wider.
        small: with a UNet of one block down and one up, which compiles in a third of the time.
        save_options: for `save_pretrained`.
    """
    settings = LAYOUTS[layout]
    tokenizer = save_tokenizer(folder / "tokenizer")
    blocks = slice(1) if small else slice(3)
    crossing = (True,) if small else settings.get("crossing", (True, True, False))
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=((320, 320, 320) if large else (32, 64, 64))[blocks],
        layers_per_block=4 if large else 1,
        down_block_types=["CrossAttnDownBlock2D" if crosses else "DownBlock2D" for crosses in crossing],
        up_block_types=["CrossAttnUpBlock2D" if crosses else "UpBlock2D" for crosses in reversed(crossing)],
        **{key: value[blocks] if isinstance(value, list) else value for key, value in settings["unet"].items()},
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.7,
    )
    text = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": PROMPT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    modules = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(CLIPTextConfig(**text | settings["text"]))}
    if "text_2" in settings:
        modules["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**text | settings["text_2"]))
        save_tokenizer(folder / "tokenizer_2", pad_token="z")  # the published one pads with `!`
    for seed, (name, module) in enumerate(modules.items()):
        randomise(module, seed).save_pretrained(folder / name, **save_options)
    save_scheduler(folder, settings["prediction_type"])
    save_index(folder, **settings.get("index", {}))
    return folder


def save_clip(folder: Path) -> Path:
    """Saves a small CLIP of random weights for pictures of 32 pixels, with its tokeniser, and returns its folder."""
    tokenizer = save_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    randomise(model, 0).save_pretrained(folder)
    normalisation = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.4, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))
    return folder


def save_clipseg(folder: Path, refined: bool = True) -> Path:
    """Saves a small CLIPSeg of random weights, `refined` as the published one is, and returns its folder."""
    tokenizer = save_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPSegConfig(
        text_config=text,
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=24,
        extract_layers=[0, 1, 3],
        conditional_layer=0,
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=48,
        use_complex_transposed_convolution=refined,
    )
    randomise(CLIPSegForImageSegmentation(config), 0).save_pretrained(folder)
    preprocessor = {"size": {"height": 64, "width": 64}, "image_mean": MEAN, "image_std": DEVIATION}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def save_vit(folder: Path) -> Path:
    """Saves a small ViT of random weights for pictures of 32 pixels, as DINO is saved, and returns its folder."""
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    randomise(ViTModel(config, add_pooling_layer=False), 0).save_pretrained(folder)
    normalisation = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.4, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))
    return folder


def save_dinov2(folder: Path, **options) -> Path:
    """Saves a small DINOv2 of random weights, for 40 pixels, that takes the middle 32 of 36; returns its folder."""
    sizes = {"hidden_size": 32, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Dinov2Config(**{**sizes, "image_size": 40, "patch_size": 4, **options})
    randomise(Dinov2Model(config), 0).save_pretrained(folder)
    preprocessor = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.3, 0.4, 0.5],
        "do_resize": True,
        "resample": 3,
        "size": {"shortest_edge": 36},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "image_processor_type": "BitImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def save_scheduler(folder: Path, prediction_type: str) -> None:
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")


def save_index(folder: Path, **entries) -> None:
    parts = {
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    if (folder / "text_encoder_2").is_dir():
        parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        parts["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    index = {"_class_name": "StableDiffusionPipeline", **entries, **parts}
    (folder / "model_index.json").write_text(json.dumps(index))


def save_full_size(folder: Path) -> Path:
    """Saves the full Stable Diffusion 1.5 architecture with random weights (4.2 GB) and the small tokeniser."""
    tokenizer = save_tokenizer(folder / "tokenizer", length=77)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    randomise(unet, 0).save_pretrained(folder / "unet")
    del unet
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    randomise(vae, 1).save_pretrained(folder / "vae")
    # transformers' defaults are the text encoder of CLIP ViT-L/14 but for these sizes.
    config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    randomise(CLIPTextModel(config), 2).save_pretrained(folder / "text_encoder")
    save_scheduler(folder, "epsilon")
    save_index(folder)
    return folder


def save_full_size_xl(folder: Path) -> Path:
    """Saves the full SDXL architecture with random weights in bfloat16 (7 GB) and CLIP's tokenisers."""
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        words = (CLIP_VOCABULARY / "vocab.json", CLIP_VOCABULARY / "merges.txt")
        CLIPTokenizer(*words, model_max_length=77, pad_token=padding).save_pretrained(folder / name)
    torch.set_default_dtype(torch.bfloat16)
    try:
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        randomise(unet, 0).save_pretrained(folder / "unet")
        del unet
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            scaling_factor=0.13025,
            force_upcast=True,
        )
        randomise(vae, 1).save_pretrained(folder / "vae")
        first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2)
        randomise(CLIPTextModel(first), 2).save_pretrained(folder / "text_encoder")
        second = CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
            hidden_act="gelu",
            eos_token_id=2,
        )
        randomise(CLIPTextModelWithProjection(second), 3).save_pretrained(folder / "text_encoder_2")
    finally:
        torch.set_default_dtype(torch.float32)
    save_scheduler(folder, "epsilon")
    save_index(folder, _class_name="StableDiffusionXLPipeline", force_zeros_for_empty_prompt=True)
    return folder
