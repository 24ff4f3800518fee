"""Models in one file: diffusers' own loader of such files and the same models as folders are the oracles."""

import inspect
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import original_layout
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from original_layout import make_modules, original_state, original_vae, save_folder, save_original
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextModelWithProjectionModule

from perfusion_jax import InputError, load_base_model
from perfusion_jax.base_model import load_architecture
from perfusion_jax.base_model.flax_classes import FlaxAutoencoderKL, FlaxCLIPTextModule, FlaxUNet2DConditionModel
from perfusion_jax.base_model.single_file import open_single_file
from perfusion_jax.base_model.source import read_config
from perfusion_jax.base_model.text import load_tokenizer
from perfusion_jax.base_model.weights import find_checkpoint, read_tree
from perfusion_jax.runtime.shipped import CLIP_VOCABULARY

VAE = "first_stage_model."
# Of a saved config, what says nothing of the model.
UNREAD = {"_diffusers_version", "_name_or_path", "dtype"}
# Ids of OpenAI's release of CLIP.
KNOWN_TOKENS = {
    "!": 0,
    "a</w>": 320,
    "of</w>": 539,
    "photo</w>": 1125,
    "dog</w>": 1929,
    "cat</w>": 2368,
    "<|startoftext|>": 49406,
    "<|endoftext|>": 49407,
}


class Model(NamedTuple):
    layout: str
    modules: dict[str, torch.nn.Module]
    state: dict[str, torch.Tensor]
    file: Path
    folder: Path


def make_model(folder, layout) -> Model:
    modules = make_modules(layout)
    state = original_state(modules)
    file = save_original(folder / "model.safetensors", state)
    return Model(layout, modules, state, file, save_folder(folder / "model", layout, modules))


@pytest.fixture(scope="module", params=sorted(original_layout.UNETS))
def model(request, tmp_path_factory) -> Model:
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory) -> Model:
    return make_model(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="module")
def sd2(tmp_path_factory) -> Model:
    return make_model(tmp_path_factory.mktemp("sd2"), "sd2")


def equal(trees, others):
    jax.tree.map(np.testing.assert_array_equal, trees, others)


def plain(config):
    return json.loads(json.dumps(config))


def shapes(component, config):
    """The parameters of a component's Flax module."""
    key = jax.random.key(0)
    if component in ("unet", "vae"):
        flax_class = {"unet": FlaxUNet2DConditionModel, "vae": FlaxAutoencoderKL}[component]
        fields = {k: config[k] for k in flax_class.__dataclass_fields__ if k in config}
        module = flax_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        return jax.eval_shape(module.init_weights, key)
    projects = config["architectures"] == ["CLIPTextModelWithProjection"]
    module = (FlaxCLIPTextModelWithProjectionModule if projects else FlaxCLIPTextModule)(CLIPTextConfig(**config))
    ids = jnp.zeros((1, 77), jnp.int32)
    return jax.eval_shape(module.init, key, ids, ids, ids)["params"]


def test_diffusers_reads_the_files_of_these_tests_as_the_same_tensors(model):
    def same(converted, module):
        expected = module.state_dict()
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], expected[name]) for name in expected)

    state, modules = load_file(model.file), model.modules
    convert = single_file_utils
    same(convert.convert_ldm_unet_checkpoint(dict(state), modules["unet"].config), modules["unet"])
    same(convert.convert_ldm_vae_checkpoint(dict(state), modules["vae"].config), modules["vae"])
    text_encoder = modules["text_encoder"]
    if model.layout == "sd2":
        same(convert.convert_open_clip_checkpoint(text_encoder, dict(state)), text_encoder)
    else:
        converted = convert.convert_ldm_clip_checkpoint(dict(state))
        same({name: t for name, t in converted.items() if not name.endswith("position_ids")}, text_encoder)
    if model.layout == "sdxl":
        second, prefix = modules["text_encoder_2"], "conditioner.embedders.1.model."
        same(convert.convert_open_clip_checkpoint(second, dict(state), prefix), second)


def test_weights_are_those_of_the_folder(model):
    opened = open_single_file(model.file)
    assert opened.vae_file is None
    for component in model.modules:
        expected = shapes(component, plain(json.loads((model.folder / component / "config.json").read_text())))
        ours = read_tree(opened.checkpoint(component), expected, jnp.dtype(jnp.float32), component)
        folders = find_checkpoint(model.folder / component, None)
        equal(ours, read_tree(folders, expected, jnp.dtype(jnp.float32), component))


def test_configs_are_those_of_the_folder(model):
    opened = open_single_file(model.file)
    assert opened.configs.keys() == {*model.modules, "scheduler"}
    for component, ours in opened.configs.items():
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        theirs = read_config(model.folder / component / name)
        read = {key: ours.get(key) for key in theirs if key not in UNREAD and key in ours}
        assert read == {key: theirs[key] for key in read}, component
        assert len(read) > 7
    assert plain(opened.index) == read_config(model.folder / "model_index.json")


def test_a_file_loads_as_its_folder_does(model):
    ours, folders = load_base_model(model.file), load_base_model(model.folder)
    equal(ours.params, folders.params)
    prompts = ["a photo of a dog", "A Teddy-Bear's beach, 1985"]
    np.testing.assert_array_equal(ours.model.tokenizer(prompts), folders.model.tokenizer(prompts))
    assert ours.model.schedule.prediction_type == folders.model.schedule.prediction_type
    np.testing.assert_array_equal(ours.model.schedule.alphas_cumprod, folders.model.schedule.alphas_cumprod)
    assert ours.name == str(model.file)
    assert ours.covariance is None
    assert ours.model == load_architecture(model.file)
    assert ours.model != load_architecture(model.folder, dtype=jnp.bfloat16)


def test_loads_where_pytorch_is_not_installed(sd1):
    program = """
        import importlib.machinery, sys

        find_spec = importlib.machinery.PathFinder.find_spec

        def without_torch(name, path=None, target=None):
            return None if name.split(".")[0] in ("torch", "torchvision") else find_spec(name, path, target)

        importlib.machinery.PathFinder.find_spec = without_torch
        import perfusion_jax

        perfusion_jax.load_base_model(sys.argv[1])
        assert "torch" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(program), sd1.file]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# Published configs: those of stable-diffusion-v1-5, stable-diffusion-2-1, -2-1-base and stable-diffusion-xl-base-1.0.
_THREE_WITH_ATTENTION = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "in_channels": 4,
    "out_channels": 4,
}
_SD2_UNET = {
    **_THREE_WITH_ATTENTION,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
_CLIP_L = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "eos_token_id": 2,
    "bos_token_id": 0,
}
_CLIP_H = {
    **_CLIP_L,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
}
_CLIP_G = {
    **_CLIP_H,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
PUBLISHED = {
    "1.5": {
        "unet": {**_THREE_WITH_ATTENTION, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        "vae": {**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
        "text_encoder": _CLIP_L,
    },
    "2.1": {
        "unet": {**_SD2_UNET, "sample_size": 96},
        "vae": {**_VAE, "sample_size": 768, "scaling_factor": 0.18215},
        "text_encoder": _CLIP_H,
    },
    "2.1 base": {
        "unet": {**_SD2_UNET, "sample_size": 64},
        "vae": {**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
        "text_encoder": _CLIP_H,
    },
    "XL": {
        "unet": {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
    },
}


def save_without_weights(file, state, metadata):
    """A file whose header is whole, and whose tensors take no room on the disk: all are zeros, of float16."""
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in state.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return file


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_configs_of_published_models_are_deduced_from_their_shapes(name, tmp_path):
    published = PUBLISHED[name]
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel(**published["unet"]),
            "vae": AutoencoderKL(**published["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**published["text_encoder"])),
        }
        if "text_encoder_2" in published:
            modules["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**published["text_encoder_2"]))
        state = original_state(modules)
    metadata = {"modelspec.prediction_type": "v"} if name == "2.1" else {}
    configs = open_single_file(save_without_weights(tmp_path / "model.safetensors", state, metadata)).configs
    assert configs.keys() - {"scheduler"} == published.keys()
    for component, expected in published.items():
        module = type(modules[component])
        if component in ("unet", "vae"):
            parameters = inspect.signature(module.__init__).parameters.values()
            # A VAE's `force_upcast` is read for XL alone.
            defaults = {p.name: p.default for p in parameters if p.name not in ("self", "force_upcast")}
            named = {"_class_name": module.__name__}
        else:
            defaults = CLIPTextConfig(architectures=[module.__name__]).to_dict()
            named = {}
        assert plain({**defaults, **configs[component]}) == plain({**defaults, **expected, **named}), component
    assert configs["scheduler"]["prediction_type"] == ("v_prediction" if name == "2.1" else "epsilon")


class TestPrediction:
    BIAS = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.norm1.bias"

    def scheduler(self, model, folder, change=None, metadata=None):
        file = save_original(folder / "changed.safetensors", {**model.state, **(change or {})}, metadata)
        opened = open_single_file(file)
        return opened.configs["scheduler"], opened.configs["unet"]["sample_size"]

    def test_a_narrow_bias_tells_that_sd2_predicts_the_noise(self, sd2, tmp_path):
        wide, narrow = (torch.tensor([-deviation, deviation]).repeat(32) for deviation in (0.0901, 0.0899))
        scheduler, size = self.scheduler(sd2, tmp_path, {self.BIAS: wide})
        assert (scheduler["prediction_type"], size) == ("v_prediction", 96)
        scheduler, size = self.scheduler(sd2, tmp_path, {self.BIAS: narrow})
        assert (scheduler["prediction_type"], scheduler["_class_name"], size) == ("epsilon", "PNDMScheduler", 64)

    @pytest.mark.parametrize(
        ("key", "value", "told"),
        [
            ("modelspec.prediction_type", "epsilon", "epsilon"),
            ("modelspec.prediction_type", "v", "v_prediction"),
            ("modelspec.predict_key", "epsilon", "epsilon"),
        ],
    )
    def test_metadata_tell(self, sd2, tmp_path, key, value, told):
        assert self.scheduler(sd2, tmp_path, metadata={key: value})[0]["prediction_type"] == told

    def test_marks_tell(self, sd1, tmp_path):
        marks = {"v_pred": torch.tensor([])}
        scheduler, size = self.scheduler(sd1, tmp_path, marks, {"modelspec.prediction_type": "epsilon"})
        assert (scheduler["prediction_type"], size) == ("v_prediction", 64)
        assert "rescale_betas_zero_snr" not in scheduler
        scheduler, _ = self.scheduler(sd1, tmp_path, {**marks, "ztsnr": torch.tensor([])})
        assert scheduler["rescale_betas_zero_snr"]
        assert scheduler["timestep_spacing"] == "trailing"

    def test_what_is_not_known_is_refused(self, sd1, tmp_path):
        with pytest.raises(InputError, match="it predicts 'flow'; supported are v, v_prediction, epsilon"):
            self.scheduler(sd1, tmp_path, metadata={"modelspec.prediction_type": "flow"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read(sd2, tmp_path, dtype):
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in sd2.state.items()}
    base = load_base_model(save_original(tmp_path / "model.safetensors", state))
    exact = load_base_model(sd2.file)
    rounded = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)).to(dtype).float().numpy(), exact.params)
    equal(base.params, rounded)


def test_layouts_of_text_encoders_that_other_programs_write(sd1, sd2, tmp_path):
    names = {name: name.replace("transformer.text_model.", "transformer.") for name in sd1.state}
    old = save_original(tmp_path / "old.safetensors", {names[name]: t for name, t in sd1.state.items()})
    equal(load_base_model(old).params["text_encoder"], load_base_model(sd1.file).params["text_encoder"])
    names = {name: name.replace("cond_stage_model.", "conditioner.embedders.0.") for name in sd2.state}
    unread = "transformer.resblocks.23."  # nor is it in files that were made from folders
    turbo = {names[name]: t for name, t in sd2.state.items() if unread not in name and "projection" not in name}
    turbo = save_original(tmp_path / "turbo.safetensors", turbo)
    equal(load_base_model(turbo).params["text_encoder"], load_base_model(sd2.file).params["text_encoder"])


def test_a_projection_stored_as_a_linear_layers_is_read_as_one(tmp_path):
    modules = make_modules("sdxl")
    state = original_state(modules)
    name = "conditioner.embedders.1.model.text_projection"
    file = save_original(tmp_path / "model.safetensors", state)
    state[f"{name}.weight"] = state.pop(name).T
    other = save_original(tmp_path / "other.safetensors", state)
    first, second = open_single_file(file), open_single_file(other)
    assert first.configs == second.configs
    expected = shapes("text_encoder_2", first.configs["text_encoder_2"])
    trees = [read_tree(o.checkpoint("text_encoder_2"), expected, jnp.dtype(jnp.float32), "t") for o in (first, second)]
    equal(*trees)


class TestOtherVae:
    @pytest.fixture
    def vae(self):
        """Its weights are twice those of the model's own."""
        vae = make_modules("sd1")["vae"]
        vae.load_state_dict({name: 2 * tensor for name, tensor in vae.state_dict().items()})
        return vae

    @pytest.fixture
    def file(self, sd1, tmp_path):
        return Path(shutil.copy(sd1.file, tmp_path / "v1.5-pruned.safetensors"))

    @pytest.mark.parametrize("layout", ["prefix", "no prefix", "diffusers"])
    def test_beside_a_model_it_replaces_the_models_own(self, vae, file, sd1, layout):
        beside = file.with_name("v1.5-pruned.vae.safetensors")
        prefix = VAE if layout == "prefix" else ""
        state = vae.state_dict() if layout == "diffusers" else {prefix + n: t for n, t in original_vae(vae).items()}
        save_original(beside, state)
        opened = open_single_file(file)
        assert opened.vae_file == beside
        own = open_single_file(sd1.file)
        assert opened.configs == own.configs
        expected = shapes("vae", opened.configs["vae"])
        theirs = read_tree(own.checkpoint("vae"), expected, jnp.dtype(jnp.float32), "vae")
        equal(
            read_tree(opened.checkpoint("vae"), expected, jnp.dtype(jnp.float32), "vae"),
            jax.tree.map(lambda leaf: 2 * leaf, theirs),
        )

    def test_may_be_named_and_may_be_all_that_there_is(self, vae, sd1, tmp_path):
        lacking = {name: tensor for name, tensor in sd1.state.items() if not name.startswith(VAE)}
        file = save_original(tmp_path / "model.safetensors", lacking)
        with pytest.raises(InputError, match=r"model\.safetensors: it holds no VAE .*model\.vae\.safetensors"):
            open_single_file(file)
        named = save_original(tmp_path / "better.safetensors", original_vae(vae))
        assert open_single_file(file, vae=named).vae_file == named
        assert open_single_file(sd1.file, vae=named).vae_file == named

    def test_as_a_pickle_is_refused(self, file):
        file.with_name("v1.5-pruned.vae.pt").write_bytes(b"")
        with pytest.raises(InputError, match=r"v1\.5-pruned\.vae\.pt: a VAE that would replace .*convert it"):
            open_single_file(file)

    def test_errors_name_its_file(self, vae, file):
        state = original_vae(vae)
        del state["encoder.conv_in.weight"]
        save_original(file.with_suffix(".vae.safetensors"), state)
        with pytest.raises(InputError, match=r"pruned\.vae\.safetensors: vae: encoder\.conv_in\.weight is missing"):
            open_single_file(file)


def refused(file, message):
    with pytest.raises(InputError, match=message) as caught:
        load_base_model(file)
    told = str(caught.value)
    assert told.startswith(str(file))
    assert "\n" not in told


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (".ckpt", r"pickled weights can run code.* python -c .*weights_only=True.*model\.safetensors'\)"),
        (".pt", "pickled weights can run code"),
        (".bin", "pickled weights can run code"),
        (".gguf", "quantised for llama.cpp: take the file whose weights are float16"),
        (".zip", "not a .safetensors file; a model is one, or a folder in the diffusers layout"),
        (".safetensors", "not a complete safetensors file"),
    ],
)
def test_other_kinds_of_files_are_refused_unread(tmp_path, suffix, message):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"weights")
    refused(file, message)
    file.unlink()
    refused(file, "no such f")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_down_blocks_0_attentions_0.lora_down.weight"], "a LoRA, which only changes a base model"),
        (["unet.mid_block.attentions.0.attn2.to_k.lora_A.weight"], "a LoRA"),
        (["unet.mid_block.attn2.processor.to_k_lora.down.weight"], "a LoRA"),
        (["emb_params"], "an embedding of a word"),
        (["clip_l", "clip_g"], "an embedding of a word"),
        (["<cat>"], "1 tensors, such as an embedding has"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.qkv.weight"], "FLUX"),
        (["model.double_layers.0.attn.w1q.weight"], "AuraFlow"),
        (["adaln_single.linear.weight", "blocks.0.scale_shift_table"], "a transformer"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE alone: name the model, and lay the VAE beside"),
        (["first_stage_model.encoder.mid.attn_1.k.weight"], "a VAE alone"),
        (["input_blocks.0.0.weight"], "a UNet alone: take the whole model"),
        (["down_blocks.0.resnets.0.conv1.weight"], r"a UNet alone: .*model_index\.json"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet alone, without a text encoder"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder alone"),
        (["foo.weight"], "no name of its 3 tensors begins with model.diffusion_model"),
    ],
)
def test_files_of_something_else_are_told_what_they_are(tmp_path, names, message):
    tensor = torch.zeros(4, 4) if names[0] in ("<cat>", "clip_l", "emb_params") else torch.zeros(4, 4, 3, 3)
    more = {} if tensor.ndim == 2 else {f"{names[0]}.{i}": tensor for i in range(2)}
    refused(save_original(tmp_path / "file.safetensors", {**dict.fromkeys(names, tensor), **more}), message)


UNET = "model.diffusion_model."


def without(state, *prefixes):
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def wide(channels):
    return {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "cond_stage_model."), "a UNet and a VAE, without a text encoder"),
        (lambda s: without(s, "cond_stage_model.", VAE), "a UNet alone, without a text encoder"),
        (lambda s: {**s, **wide(9)}, "a model for inpainting, whose UNet takes 9 channels"),
        (lambda s: {**s, **wide(5)}, "a model for depth, whose UNet takes 5 channels"),
        (lambda s: {**s, **wide(8)}, r"a model for editing by instructions \(pix2pix\)"),
        (lambda s: {**s, "edm_mean": torch.zeros(4)}, "Playground 2.5"),
        (lambda s: {**s, "edm_vpred.sigma_max": torch.zeros(1)}, "CosXL"),
        (lambda s: {**s, **wide(8), f"{UNET}input_blocks.1.1.time_stack.0.norm1.bias": torch.zeros(1)}, "for video"),
        (lambda s: {**s, "noise_augmentor.data_mean": torch.zeros(1)}, "unCLIP"),
        (lambda s: {**s, f"{UNET}out.2.weight.quant_map": torch.zeros(16)}, "quantised by bitsandbytes"),
        (lambda s: {**s, f"{UNET}out.2.weight": torch.zeros(4, 32, 3, 3, dtype=torch.uint8)}, "out.2.weight is U8"),
        (
            lambda s: {**s, f"{UNET}out.2.weight": torch.zeros(4, 32, 3, 3, dtype=torch.float8_e4m3fn)},
            "unet: out.2.weight is float8; weights must be float16 or wider",
        ),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, r"unexpected: \['extra.weight'\]"),
        (lambda s: {**s, f"{UNET}extra.weight": torch.zeros(1)}, rf"unet: .*unexpected: \['{UNET}extra.weight'\]"),
        (lambda s: without(s, f"{UNET}out.0.weight"), r"unet: .*missing: \['conv_norm_out.weight'\]"),
        (lambda s: without(s, f"{UNET}out.2.weight"), "unet: out.2.weight is missing"),
        (lambda s: without(s, f"{UNET}middle_block.1."), "unet: its attention has .* perhaps a distilled one"),
        (lambda s: {**s, f"{UNET}out.2.weight": torch.zeros(4, 32)}, r"out.2.weight has shape \(4, 32\), where 4 axes"),
        (lambda s: {**s, f"{VAE}decoder.conv_in.bias": torch.ones(3)}, r"vae: .*conv_in.bias has shape \(3,\)"),
        (lambda s: {**s, f"{VAE}decoder.conv_in.bias": torch.full((64,), np.nan)}, "vae: .*not finite"),
        (
            lambda s: {**s, f"{UNET}label_emb.0.0.weight": torch.zeros(4, 4)},
            r"a UNet and a VAE, without the second text encoder \(conditioner.embedders.1.model.\*\)",
        ),
        (
            lambda s: {
                **without(s, "cond_stage_model."),
                f"{UNET}label_emb.0.0.weight": torch.zeros(4, 4),
                "conditioner.embedders.0.model.positional_embedding": torch.zeros(4, 4),
            },
            "a refiner, which only finishes the pictures of another model",
        ),
    ],
)
def test_models_that_cannot_be_run_are_refused(sd1, tmp_path, change, message):
    refused(save_original(tmp_path / "model.safetensors", change(sd1.state)), message)


def test_a_concept_is_no_base_model(tmp_path):
    state = {f"key_outputs.{i}": torch.zeros(4) for i in range(4)}
    refused(
        save_original(tmp_path / "dog.safetensors", state, {"format": "perfusion_jax concept 1"}),
        "a concept, which only changes a base model: name the base model instead",
    )


def test_a_file_has_no_variant_and_no_revision(sd1):
    with pytest.raises(InputError, match="a single file has no revision None or variant 'fp16'"):
        load_base_model(sd1.file, variant="fp16")


class TestVocabulary:
    def test_is_clips(self):
        vocabulary = json.loads((CLIP_VOCABULARY / "vocab.json").read_text(encoding="utf-8"))
        assert sorted(vocabulary.values()) == list(range(49408))
        assert KNOWN_TOKENS.items() <= vocabulary.items()
        merges = (CLIP_VOCABULARY / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        # 256 bytes, each within a word and at its end; then one token for each merge, in order; then the marks.
        assert [vocabulary["".join(merge.split())] for merge in merges] == list(range(512, 49406))
        assert "Copyright (c) 2021 OpenAI" in (CLIP_VOCABULARY / "LICENSE").read_text()

    def test_prompts_are_padded_as_the_text_encoder_was_trained(self):
        config = CLIPTextConfig(max_position_embeddings=8)
        of_sd1 = load_tokenizer(CLIP_VOCABULARY, config)
        of_sd2 = load_tokenizer(CLIP_VOCABULARY, config, padding="!")
        words = [49406, 320, 1125, 539, 320, 1929, 256, 49407]
        assert of_sd1(["a photo of a dog!"]).tolist() == of_sd2(["a photo of a dog!"]).tolist() == [words]
        assert of_sd1(["cat"]).tolist() == [[49406, 2368, *[49407] * 6]]
        assert of_sd2(["cat"]).tolist() == [[49406, 2368, 49407, *[0] * 5]]
