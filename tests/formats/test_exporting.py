"""What other tools read of concepts: drawn by diffusers, and by the names that the others look up."""

import dataclasses
import json
import re
import shutil

import diffusers
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from exported import PROMPTS, SEEDS, STEPS, drawn_baked, learnt
from original_layout import make_modules, original_state, save_original
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from perfusion_jax import InputError, bake, generate, load_base_model
from perfusion_jax.drawing.denoising import noise_for
from perfusion_jax.formats.exporting import export, fitted_strengths
from perfusion_jax.formats.lora import balanced, embedding_bytes, lora_bytes
from perfusion_jax.method.edit import Factors
from perfusion_jax.method.surgery import baked_changes, cross_attention_layers

pytestmark = [
    # diffusers asks PyTorch's tensors for NumPy arrays in the way of NumPy 1.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]


@pytest.fixture(scope="module")
def rex(base):
    return learnt(base)


def drawn_by(pipeline, base, prompts=PROMPTS):
    pipeline.set_progress_bar_config(disable=True)
    config = {**pipeline.scheduler.config, "clip_sample": False}
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(config)
    noise = np.asarray(noise_for(base.model, SEEDS, 32, 32)).transpose(0, 3, 1, 2).copy()
    return (
        255
        * pipeline(
            prompts,
            latents=torch.from_numpy(noise),
            num_inference_steps=STEPS,
            guidance_scale=6.0,
            height=32,
            width=32,
            output_type="np",
        ).images
    )


def open_base(folder):
    return diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)


def add_words(pipeline, base, out, names=("rex",)):
    """As the model card says."""
    for name in names:
        file = out / f"{name}_word.safetensors"
        if len(base.model.text_encoders) == 1:
            pipeline.load_textual_inversion(str(file), token=f"<{name}>")
            continue
        words = load_torch(file)
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipeline, f"text_encoder{number}"), getattr(pipeline, f"tokenizer{number}")
            pipeline.load_textual_inversion(words[key], token=f"<{name}>", text_encoder=encoder, tokenizer=tokenizer)
            encoder.text_model.eos_token_id = tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["lora", pytest.param("lora-peft", marks=pytest.mark.slow)])
def test_diffusers_draws_a_lora_as_we_draw_the_baked_edit(folder, base, rex, tmp_path, kind):
    export(base, [rex], kind, tmp_path, dtype="float32")
    pipeline = open_base(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="rex_lora.safetensors")
    add_words(pipeline, base, tmp_path)
    ours, theirs = drawn_baked(base, [rex]), drawn_by(pipeline, base)
    assert np.abs(ours - theirs).max() <= 2
    plain = generate(base, PROMPTS, SEEDS, [rex], strength=0.0, sampler="ddim", steps=STEPS, height=32, width=32)
    assert np.abs(plain - 1.0 * ours).mean() > 1  # the edit is to be seen


def test_diffusers_draws_a_pipeline_as_we_draw_the_baked_edit(base, rex, tmp_path):
    export(base, [rex], "pipeline", tmp_path, dtype="float32")
    theirs = drawn_by(diffusers.DiffusionPipeline.from_pretrained(tmp_path), base)
    assert np.abs(drawn_baked(base, [rex]) - theirs).max() <= 2
    again = load_base_model(tmp_path)
    ours = generate(again, PROMPTS, SEEDS, sampler="ddim", steps=STEPS, height=32, width=32)
    assert np.abs(ours - theirs).max() <= 2


def test_diffusers_draws_a_pipeline_of_a_model_in_one_file(tmp_path):
    """Its vocabulary is the one that ships, which says nothing of how long prompts are."""
    base = load_base_model(save_original(tmp_path / "model.safetensors", original_state(make_modules("sd1"))))
    rex = learnt(base)
    export(base, [rex], "pipeline", tmp_path / "out", dtype="float32")
    theirs = drawn_by(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out"), base)
    assert np.abs(drawn_baked(base, [rex]) - theirs).max() <= 2


def test_what_an_edit_changes_is_enough_to_export_from(folder, base, rex, tmp_path):
    part = load_base_model(folder, edited_only=True)
    assert part.fingerprint == base.fingerprint
    assert part.params.keys() == {"unet"}
    for kind in ("lora", "bundle"):
        files = export(part, [rex], kind, tmp_path / kind)
        whole = export(base, [rex], kind, tmp_path / f"whole-{kind}")
        assert [file.read_bytes() for file in files] == [file.read_bytes() for file in whole]


def test_strengths_are_fitted_by_prompts_that_name_the_concepts(sd1_base):
    rex = learnt(sd1_base)
    unmoved = rex._replace(concept=sd1_base.new_concept("dog", jnp.eye(sd1_base.model.context_width)))
    assert fitted_strengths(sd1_base, [unmoved]) == [1]
    fitted = fitted_strengths(sd1_base, [rex, learnt(sd1_base, "tom", "cat", seed=1)])
    assert len(fitted) == 2
    assert 1 not in fitted


def test_several_concepts_are_baked_together(sd1_folder, sd1_base, tmp_path):
    both = [learnt(sd1_base), learnt(sd1_base, "tom", "cat", seed=1)]
    prompts = ["a <rex> and a <tom> on the beach", "a photo of a <tom>"]
    export(sd1_base, both, "lora", tmp_path, strengths=[1.0, 0.6], dtype="float32")
    pipeline = open_base(sd1_folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="rex_tom_lora.safetensors")
    add_words(pipeline, sd1_base, tmp_path, ("rex", "tom"))
    ours = drawn_baked(sd1_base, both, prompts, [1.0, 0.6])
    assert np.abs(ours - drawn_by(pipeline, sd1_base, prompts)).max() <= 2


def test_factors_are_what_baking_adds(base, rex):
    baked = cross_attention_layers(bake(base.params["unet"], rex.concept, 0.7))
    plain = cross_attention_layers(base.params["unet"])
    changes = baked_changes(base.params["unet"], rex.concept, 0.7)
    assert len(changes) == 2 * len(plain)
    for path, factors in changes.items():
        layer, projection, _ = path.rsplit("/", 2)
        expected = np.float64(baked[layer][projection]["kernel"]) - np.float64(plain[layer][projection]["kernel"])
        down, up = balanced(factors)
        np.testing.assert_allclose((up @ down).T, expected, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(down, axis=1), np.linalg.norm(up, axis=0), rtol=1e-5)


def test_balanced_factors_of_no_strength_are_zero():
    down, up = balanced(Factors(jnp.zeros((1, 4)), jnp.ones((1, 3))))
    assert np.isfinite(up).all()
    assert not (up @ down).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_are_of_the_dtype_asked_for_and_equal_concepts_are_equal_files(sd1_base, tmp_path, dtype):
    rex = learnt(sd1_base)
    export(sd1_base, [rex], "lora", tmp_path, dtype=dtype)
    tensors = load_torch(tmp_path / "rex_lora.safetensors")
    assert {str(t.dtype) for name, t in tensors.items() if "alpha" not in name} == {f"torch.{dtype}"}
    assert (tmp_path / "rex_lora.safetensors").read_bytes() == lora_bytes(sd1_base, [rex], dtype=dtype)
    exact = load_lora(lora_bytes(sd1_base, [rex], dtype="float32"), tmp_path)
    for name, tensor in exact.items():
        np.testing.assert_allclose(tensors[name].float(), tensor, rtol=1e-2, atol=1e-6)


def load_lora(data, folder):
    (folder / "exact.safetensors").write_bytes(data)
    return load_file(folder / "exact.safetensors")


def test_numbers_that_float16_cannot_hold_are_refused(sd1_base):
    rex = learnt(sd1_base)
    large = rex._replace(concept=dataclasses.replace(rex.concept, embedding=rex.concept.embedding * 1e9))
    with pytest.raises(InputError, match="emb_params has numbers that float16 cannot hold: ask for bfloat16"):
        embedding_bytes(sd1_base.model, large)


def test_what_a_folder_holds_is_not_mixed_up(sd1_base, tmp_path):
    rex = learnt(sd1_base)
    export(sd1_base, [rex], "lora", tmp_path)
    export(sd1_base, [rex], "lora", tmp_path)  # anew
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    other = "which is an export of another kind, or of other concepts: name a new folder, or delete it"
    with pytest.raises(InputError, match=other):
        export(sd1_base, [rex], "lora-peft", tmp_path)
    with pytest.raises(InputError, match=other):
        export(sd1_base, [learnt(sd1_base, "tom")], "lora", tmp_path)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_folder_of_somebodys_is_not_written_to(sd1_folder, sd1_base, tmp_path):
    """Not even one that holds what a pipeline does: it may be the base model itself."""
    model = shutil.copytree(sd1_folder, tmp_path / "model")
    (model / "README.md").write_text("mine")
    for kind in ("pipeline", "lora"):
        with pytest.raises(InputError, match="which is no part of an export of this version: name a new folder"):
            export(load_base_model(model), [learnt(sd1_base)], kind, model)
    assert (model / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "onnx"}, "'onnx' is not a kind of export: lora, "),
        ({"concepts": []}, "no concept to export"),
        ({"strengths": [1.0, 2.0]}, "2 strengths for 1 concepts"),
        ({"strengths": [float("nan")]}, r"strengths \[nan\]: not finite"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, bfloat16, float16"),
    ],
)
def test_what_cannot_be_exported_is_one_line(sd1_base, tmp_path, arguments, message):
    given = {"concepts": [learnt(sd1_base)], "kind": "lora", "out": tmp_path / "out", **arguments}
    with pytest.raises(InputError, match=message):
        export(sd1_base, **given)
    assert not (tmp_path / "out").exists()


def test_two_concepts_of_one_name_are_refused(sd1_base, tmp_path):
    with pytest.raises(InputError, match="two concepts are called rex"):
        export(sd1_base, [learnt(sd1_base), learnt(sd1_base, seed=1)], "lora", tmp_path)


def test_a_bucket_is_written_to(sd1_base, bucket):
    files = export(sd1_base, [learnt(sd1_base)], "lora", f"{bucket}/exports/rex")
    assert [file.name for file in files] == ["rex_lora.safetensors", "rex_word.safetensors", "README.md"]
    assert files[-1].read_text().startswith("---\nlicense: ")


def test_a_pipeline_goes_to_a_bucket_as_to_a_folder(sd1_base, bucket, tmp_path):
    rex = learnt(sd1_base)
    export(sd1_base, [rex], "pipeline", tmp_path)
    export(sd1_base, [rex], "pipeline", f"{bucket}/exports/rex")
    local = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"} <= local.keys()
    for name, path in local.items():
        assert (epath.Path(f"{bucket}/exports/rex") / name).read_bytes() == path.read_bytes()


def test_a_bucket_that_cannot_be_written_is_one_line(sd1_base, bucket, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("Forbidden: https://storage.googleapis.com/bucket")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", refuse)
    for kind in ("lora", "pipeline"):
        with pytest.raises(InputError, match=r"gs://bucket/exports/.*: cannot be written \(Forbidden"):
            export(sd1_base, [learnt(sd1_base)], kind, f"{bucket}/exports")


@pytest.mark.parametrize("kind", ["pipeline", "orbax"])
def test_a_model_that_float16_cannot_hold_is_refused(sd1_base, tmp_path, kind):
    unet = sd1_base.params["unet"]
    large = {**unet, "conv_in": jax.tree.map(lambda leaf: leaf * 1e9, unet["conv_in"])}
    base = dataclasses.replace(sd1_base, params={**sd1_base.params, "unet": large})
    with pytest.raises(InputError, match=r"conv_in.* has numbers that float16 cannot hold: ask for bfloat16"):
        export(base, [learnt(sd1_base)], kind, tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_concept_of_another_base_is_refused(sd1_base, small_base, tmp_path):
    with pytest.raises(InputError, match=r"rex: trained on the base model .*, which .* is not: give --base"):
        export(sd1_base, [learnt(small_base)], "lora", tmp_path)


def test_the_card_can_be_read_by_the_hub(sd1_base, tmp_path):
    from huggingface_hub import ModelCard

    export(sd1_base, [learnt(sd1_base)], "lora", tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc0-1.0"
    assert card.data.instance_prompt == "a photo of a <rex> on the beach"
    assert {"lora", "text-to-image", "template:sd-lora"} <= set(card.data.tags)
    assert "<lora:rex_lora:1>" in card.text


def test_of_several_licences_the_card_claims_none(sd1_base, tmp_path):
    rex, tom = learnt(sd1_base), learnt(sd1_base, "tom", "cat", seed=1)
    tom = tom._replace(card=dataclasses.replace(tom.card, licence=""))
    export(sd1_base, [rex, tom], "lora", tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "license: unknown" in card
    assert "| rex | dog | 100 | 1 | cc0-1.0 |\n| tom | cat | 100 | 1 | not said |" in card


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("lora-peft", "embedding", "pipeline")]


@pytest.mark.parametrize("kind", ["lora", *SLOW_KINDS])
def test_the_python_of_the_card_runs(base, rex, tmp_path, monkeypatch, kind):
    """As somebody would copy it, in the folder of the export."""
    export(base, [rex], kind, tmp_path, dtype="float32")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    drawn = {}
    exec(code.replace("pipe(", "pipe(num_inference_steps=2, prompt="), drawn)
    assert drawn["picture"].size == (32, 32)


def test_metadata_are_strings_that_tools_show(sd1_base, tmp_path):
    data = lora_bytes(sd1_base, [learnt(sd1_base)])
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["modelspec.trigger_phrase"] == "rex_word"
    assert json.loads(metadata["ss_tag_frequency"]) == {"rex": {"rex_word": 1}}
