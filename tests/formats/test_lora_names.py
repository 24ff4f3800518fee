"""The names in a LoRA file against those that other tools look up, on UNets built as the published ones are.

What the tools do is written down here as facts; their sources are A1111's `extensions-builtin/Lora/networks.py`,
ComfyUI's `comfy/lora.py` and `comfy/utils.py` (Forge's are the same), and kohya's `networks/lora.py`.
"""

import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from original_layout import original_unet
from safetensors.numpy import load

from perfusion_jax.formats.concept_file import ConceptCard, TrainedConcept
from perfusion_jax.formats.lora import bundle_bytes, embedding_bytes, lora_bytes
from perfusion_jax.formats.tensor_file import read_header
from perfusion_jax.method.concept import Concept
from perfusion_jax.method.surgery import cross_attention_layers

# The blocks of the published models, with fewer channels: names do not depend on these.
FOUR = {
    "block_out_channels": (32, 32, 32, 32),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
XL = {
    "block_out_channels": (32, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
MODELS = {
    "sd1": (FOUR, (768,), "epsilon"),
    "sd2": ({**FOUR, "use_linear_projection": True}, (1024,), "v_prediction"),
    "sdxl": (XL, (768, 1280), "epsilon"),
}
# How many projections to keys and values the published models have.
PROJECTIONS = {"sd1": 32, "sd2": 32, "sdxl": 140}
# A1111 translates names of diffusers to those of the original code by these rules.
A1111 = (
    (r"down_blocks_(\d+)_attentions_(\d+)_(.+)", lambda i, j, rest: f"input_blocks_{1 + int(i) * 3 + int(j)}_1_{rest}"),
    (r"mid_block_attentions_(\d+)_(.+)", lambda i, rest: f"middle_block_1_{rest}"),
    (r"up_blocks_(\d+)_attentions_(\d+)_(.+)", lambda i, j, rest: f"output_blocks_{int(i) * 3 + int(j)}_1_{rest}"),
)
METADATA = {
    "sd1": ("sd_v1", None, "stable-diffusion-v1"),
    "sd2": ("sd_v2", "True", "stable-diffusion-v2-768-v"),
    "sdxl": ("sdxl_base_v1-0", None, "stable-diffusion-xl-v1-base"),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def published(request):
    """The layout, PyTorch's UNet without weights, a base model of that layout, and a concept of it."""
    options, widths, prediction = MODELS[request.param]
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=sum(widths), attention_head_dim=8, **options)
    tree = {}
    for name, weight in unet.state_dict().items():
        if ".attn2.to_k." in name or ".attn2.to_v." in name:
            *path, _ = re.sub(r"\.(\d+)", r"_\1", name).split(".")
            branch = tree
            for part in path:
                branch = branch.setdefault(part, {})
            branch["kernel"] = jnp.ones(weight.shape[::-1])
    encoders = tuple(SimpleNamespace(width=width) for width in widths)
    schedule = SimpleNamespace(prediction_type=prediction)
    model = SimpleNamespace(context_width=sum(widths), text_encoders=encoders, schedule=schedule)
    vector = jnp.arange(sum(widths)) / sum(widths)
    concept = Concept.from_super_category(cross_attention_layers(tree), vector, vector, jnp.eye(sum(widths)))
    card = ConceptCard("rex", "dog", "published", (), 0.6, 0.15, 6.0, 100)
    return request.param, unet, SimpleNamespace(params={"unet": tree}, model=model), TrainedConcept(concept, card)


def wanted(unet):
    return [name.removesuffix(".weight") for name in unet.state_dict() if re.search(r"attn2\.to_[kv]\.weight$", name)]


def modules_of(tensors, *endings):
    """The modules that tensors belong to, each of which must have all of the endings and no others."""
    modules = {}
    for name in tensors:
        ending = next(ending for ending in endings if name.endswith(ending))
        modules.setdefault(name.removesuffix(ending), set()).add(ending)
    assert all(found == set(endings) for found in modules.values())
    return set(modules)


def test_comfyui_forge_and_kohya_find_every_key(published):
    """They look a module up by diffusers' name, all dots replaced."""
    layout, unet, base, rex = published
    tensors = load(lora_bytes(base, [rex]))
    modules = modules_of(tensors, ".lora_down.weight", ".lora_up.weight", ".alpha")
    assert modules == {"lora_unet_" + name.replace(".", "_") for name in wanted(unet)}
    assert len(modules) == PROJECTIONS[layout]


def test_a1111_finds_every_key(published):
    _, unet, base, rex = published
    tensors = load(lora_bytes(base, [rex]))
    found = set()
    for name in modules_of(tensors, ".lora_down.weight", ".lora_up.weight", ".alpha"):
        rules = ((re.fullmatch("lora_unet_" + pattern, name), rule) for pattern, rule in A1111)
        match, rule = next((match, rule) for match, rule in rules if match)
        found.add(rule(*match.groups()))
    original = {name.removesuffix(".weight").replace(".", "_") for name in original_unet(unet)}
    assert found == {name for name in original if name.endswith(("attn2_to_k", "attn2_to_v"))}


def test_diffusers_finds_every_key_of_the_peft_style(published):
    _, unet, base, rex = published
    tensors = load(lora_bytes(base, [rex], peft=True))
    modules = modules_of(tensors, ".lora_A.weight", ".lora_B.weight")
    assert modules == {f"unet.{name}" for name in wanted(unet)}


def test_rank_alpha_and_shapes(published):
    _, unet, base, rex = published
    tom = rex._replace(card=ConceptCard("tom", "cat", "published", (), 0.6, 0.15, 6.0, 100))
    weights = unet.state_dict()
    for concepts in ([rex], [rex, tom]):
        rank = len(concepts)
        tensors = load(lora_bytes(base, concepts))
        for name in wanted(unet):
            outputs, inputs = weights[f"{name}.weight"].shape
            stem = "lora_unet_" + name.replace(".", "_")
            assert tensors[f"{stem}.lora_down.weight"].shape == (rank, inputs)
            assert tensors[f"{stem}.lora_up.weight"].shape == (outputs, rank)
            assert tensors[f"{stem}.alpha"].shape == ()
            assert tensors[f"{stem}.alpha"] == rank


def test_words_are_found_by_every_tool(published):
    """A single encoder: one key, which A1111, ComfyUI, kohya take whatever it is called; of XL, clip_l and clip_g."""
    layout, _, base, rex = published
    tensors = load(embedding_bytes(base.model, rex, "float32"))
    if layout == "sdxl":
        assert {name: tensor.shape for name, tensor in tensors.items()} == {"clip_l": (1, 768), "clip_g": (1, 1280)}
        both = np.concatenate([tensors["clip_l"], tensors["clip_g"]], axis=1)
    else:
        assert list(tensors) == ["emb_params"]
        both = tensors["emb_params"]
    np.testing.assert_array_equal(both[0], rex.concept.embedding)


def test_a_bundle_holds_the_words_where_a1111_looks_for_them(published):
    """`bundle_emb.NAME.KEY`, NAME without a dot; KEYs as in an embedding file."""
    layout, _, base, rex = published
    tensors = load(bundle_bytes(base, [rex]))
    words = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("lora_unet_")}
    expected = {"bundle_emb.rex_word.clip_l": (1, base.model.text_encoders[0].width)}
    if layout == "sdxl":
        expected["bundle_emb.rex_word.clip_g"] = (1, 1280)
    assert words == expected


def test_metadata_say_which_base_model_it_is_for(published):
    layout, _, base, rex = published
    metadata = read_header(lora_bytes(base, [rex]))["__metadata__"]
    version, second, architecture = METADATA[layout]
    assert metadata["ss_base_model_version"] == version
    assert metadata.get("ss_v2") == second
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    words = read_header(embedding_bytes(base.model, rex))["__metadata__"]
    assert words["modelspec.architecture"] == f"{architecture}/textual-inversion"
