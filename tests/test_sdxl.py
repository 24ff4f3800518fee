"""Models in the layout of SDXL from end to end: two text encoders, a vector for the whole prompt, and picture sizes."""

import dataclasses
import inspect
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import save_checkpoint
from etils import epath
from PIL import Image
from safetensors.numpy import load_file

from perfusion_jax import InputError, generate, load_base_model
from perfusion_jax.base_model import load_architecture, whole_sizes
from perfusion_jax.config import make_config
from perfusion_jax.data.pictures import fit, read_picture
from perfusion_jax.data.text_covariance import accumulate, covariance_of
from perfusion_jax.drawing.denoising import Concepts, noise_for, prompt_context
from perfusion_jax.drawing.generation import drawing
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.formats.lora import lora_bytes
from perfusion_jax.learning.runs import train_fleet, train_one
from perfusion_jax.method.concept import stack
from perfusion_jax.method.edit import Gate

# diffusers asks PyTorch's tensors for NumPy arrays in the way of NumPy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PUBLISHED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
"""The scheduler of the published base model, Euler's."""


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("sdxl"), "sdxl", small=True)
    diffusers.EulerDiscreteScheduler(**PUBLISHED).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def xl_base(xl_folder):
    return load_base_model(xl_folder)


@pytest.mark.parametrize("negative", [None, "", "a cat in the snow"])
def test_pictures_of_twenty_steps_equal_pytorch(xl_folder, xl_base, negative):
    """Zeros stand for the empty prompt where none is given, and only there."""
    prompts = ["a photo of a dog", "the teddy bear on the beach, snow"]
    noise = np.asarray(noise_for(xl_base.model, [3, 4], 32, 48))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompts,
        negative_prompt=None if negative is None else [negative] * 2,
        num_inference_steps=20,
        guidance_scale=5.0,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        height=32,
        width=48,
        output_type="np",
    ).images
    ours = generate(xl_base, prompts, [3, 4], steps=20, guidance=5.0, negative_prompt=negative, height=32, width=48)
    assert np.abs(ours - np.round(255 * theirs)).max() <= 1


def test_the_global_lock_takes_the_vector_of_the_super_categorys_prompt(xl_base):
    concept = xl_base.new_concept("dog", jnp.eye(xl_base.model.context_width))
    moved = stack([concept, concept])
    noise = jax.random.normal(jax.random.key(0), moved.embedding.shape)
    moved = dataclasses.replace(moved, embedding=moved.embedding + noise)
    ids = xl_base.model.tokenizer(["a <rex> in the snow"], ["<rex>"])
    words = jnp.tile(xl_base.super_category_embedding("dog"), (2, 1))
    gates = Gate(*(jnp.ones(2) for _ in Gate._fields))
    local = Concepts(moved, gates, jnp.array([[1.0, 0.0]]), jnp.ones((1, 2)), None)
    plain = xl_base.model.encode(xl_base.params, xl_base.model.tokenizer(["a dog in the snow"]))
    contexts = [
        prompt_context(xl_base.model, xl_base.params, ids, whole_sizes(32, 32), concepts)
        for concepts in (local, local._replace(super_embeddings=words))
    ]
    own, locked = (context.added.pooled[0] for context in contexts)
    np.testing.assert_allclose(locked, plain.pooled, atol=1e-5)
    assert np.abs(own - plain.pooled).max() > 1e-2


@pytest.mark.parametrize(
    ("size", "crop", "sizes"),
    [
        ((60, 40), True, (60, 40, 8, 0, 32, 32)),
        ((40, 100), True, (40, 100, 0, 24, 32, 32)),
        ((40, 100), False, (40, 100, 0, 0, 32, 32)),
        ((20, 20), True, (20, 20, 0, 0, 32, 32)),
    ],
)
def test_a_picture_tells_its_size_and_where_it_was_cut(tmp_path, size, crop, sizes):
    Image.new("RGB", size[::-1]).save(tmp_path / "picture.png")
    picture = read_picture(epath.Path(tmp_path / "picture.png"), None, None, "")
    assert fit(picture, 32, crop).sizes == sizes


class TestLearning:
    """Whole runs."""

    @pytest.fixture(scope="class")
    @staticmethod
    def inputs(tmp_path_factory, xl_base):
        folder = tmp_path_factory.mktemp("inputs")
        rng = np.random.default_rng(0)
        for name in ("rex", "tom"):
            (folder / "things" / name).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "things" / name / f"{number}.png")
        (folder / "table.csv").write_text("name,pictures,super_category\nrex,things/rex,dog\ntom,things/tom,cat\n")
        width = xl_base.model.context_width
        factor = rng.standard_normal((width, width))
        np.savez(folder / "covariance.npz", covariance=factor @ factor.T + np.eye(width))
        return folder

    @staticmethod
    def config(inputs, xl_folder, **keys):
        return make_config(
            str(xl_folder),
            covariance=str(inputs / "covariance.npz"),
            evaluator="none",
            size=32,
            steps=4,
            batch_size=2,
            validate_every=0,
            templates=("a photo of a {}",),
            validation_prompts=(),
            **keys,
        )

    def test_concepts_learnt_alone_and_together_draw(self, inputs, xl_folder, xl_base, tmp_path, caplog):
        width = xl_base.model.context_width
        alone = self.config(inputs, xl_folder, name="rex", super_category="dog", pictures=str(inputs / "things/rex"))
        file = train_one(alone, epath.Path(tmp_path / "alone"))
        tensors = load_file(file)
        assert tensors["embedding"].shape == (48 + 64,)
        assert tensors["target_input"].shape == (width,)
        config = self.config(inputs, xl_folder, concepts=str(inputs / "table.csv"), exports=("lora", "bundle"))
        somebodys = tmp_path / "fleet/exports/tom/bundle/README.md"
        somebodys.parent.mkdir(parents=True)
        somebodys.write_text("mine")
        train_fleet(config, epath.Path(tmp_path / "fleet"))
        assert "tom is learnt, and not exported as bundle: " in caplog.text
        assert somebodys.read_text() == "mine"
        together = load_file(tmp_path / "fleet/concepts/rex.safetensors")
        for name, tensor in tensors.items():
            np.testing.assert_allclose(together[name], tensor, atol=2e-5 * max(1, np.abs(tensor).max()), err_msg=name)
        concepts = [load_concept(tmp_path / f"fleet/concepts/{name}.safetensors", xl_base) for name in ("rex", "tom")]
        for concept in concepts:
            folder = tmp_path / "fleet/exports" / concept.card.name
            exported = (folder / f"lora/{concept.card.name}_lora.safetensors").read_bytes()
            assert exported == lora_bytes(xl_base, [concept])
            assert (folder / "bundle/README.md").is_file()
        options = {"steps": 2, "height": 32, "width": 32, "attention": True}
        for lock in ("local", "global"):
            (drawn,) = drawing(xl_base, ["a <rex> and a <tom>"], [0], concepts, lock=lock, **options)
            assert np.std(drawn.pixels) > 1
            np.testing.assert_allclose(drawn.attention.sum(-1), 1, atol=1e-4)

    def test_the_covariance_is_of_both_encoders(self, xl_base, tmp_path):
        words = ["a", "photo", "of", "the", "dog", "cat", "teddy", "bear", "on", "beach", "in", "snow", "and", "my"]
        rng = np.random.default_rng(0)
        file = tmp_path / "captions.txt"
        file.write_text("".join(" ".join(rng.choice(words, rng.integers(3, 12))) + "\n" for _ in range(200)))
        *_, progress = accumulate(xl_base, file)
        covariance = covariance_of(progress, file)
        ids, mask = xl_base.model.tokenizer.captions(file.read_text().splitlines())
        encodings = np.asarray(xl_base.model.encode(xl_base.params, ids).tokens, np.float64)[mask]
        np.testing.assert_allclose(covariance, encodings.T @ encodings / len(encodings), atol=1e-3)


def changed(folder, tmp_path, file, **entries):
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(content | entries))
    return copy


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("model_index.json", {"requires_aesthetics_score": True}, r"model_index\.json: a refiner"),
        ("model_index.json", {"unet": [None, None], "_class_name": "FluxPipeline"}, "FluxPipeline has no unet"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 80}, r"reads a vector of 32 .* has 40"),
        ("unet/config.json", {"addition_embed_type": "image"}, r"unet/config\.json: addition_embed_type = 'image'"),
        ("text_encoder_2/config.json", {"architectures": ["CLIPTextModel"]}, "the text encoders give 0"),
        ("text_encoder_2/config.json", {"hidden_size": 32}, "the text encoder's are 80 wide"),
        ("vae/config.json", {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, r"vae/config\.json: .* need 4"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "not both lists"),
    ],
)
def test_what_does_not_fit_is_one_line(xl_folder, tmp_path, file, entries, message):
    with pytest.raises(InputError, match=message) as raised:
        load_architecture(changed(xl_folder, tmp_path, file, **entries))
    assert "\n" not in str(raised.value)


def test_a_second_tokeniser_of_other_words_is_refused(xl_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(xl_folder, copy)
    file = copy / "tokenizer_2/vocab.json"
    words = json.loads(file.read_text())
    words["dog</w>"], words["cat</w>"] = words["cat</w>"], words["dog</w>"]
    file.write_text(json.dumps(words))
    with pytest.raises(InputError, match=r"tokenizer_2: its words are not those of"):
        load_architecture(copy)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (diffusers.EulerAncestralDiscreteScheduler, 1),  # SDXL Turbo's
        (diffusers.EulerDiscreteScheduler, 4),  # SD Turbo's, and Lightning's
    ],
)
def test_models_of_few_steps_draw_as_published(xl_folder, tmp_path, scheduler, steps):
    """Their schedulers say that timesteps trail; their users turn guidance off."""
    copy = changed(xl_folder, tmp_path, "model_index.json", scheduler=["diffusers", scheduler.__name__])
    options = {name: value for name, value in PUBLISHED.items() if name in inspect.signature(scheduler).parameters}
    scheduler(**options | {"timestep_spacing": "trailing"}).save_pretrained(copy / "scheduler")
    base = load_base_model(copy)
    noise = np.asarray(noise_for(base.model, [3], 32, 32)).transpose(0, 3, 1, 2).copy()
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(copy)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": 0.0, "height": 32, "width": 32}
    theirs = pipeline("a dog", latents=torch.from_numpy(noise), output_type="np", **options).images
    ours = generate(base, ["a dog"], [3], steps=steps, guidance=0.0, height=32, width=32)
    assert np.abs(ours - np.round(255 * theirs)).max() <= 1


def test_latents_with_means_and_deviations_of_their_own_equal_pytorch(xl_folder, tmp_path):
    mean, std = [0.1, -0.2, 0.3, 0.05], [1.5, 0.5, 2.0, 0.8]
    copy = changed(xl_folder, tmp_path, "vae/config.json", latents_mean=mean, latents_std=std)
    base = load_base_model(copy)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(copy)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.asarray(noise_for(base.model, [3], 32, 32)).transpose(0, 3, 1, 2).copy()
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 32, "width": 32}
    theirs = pipeline("a dog", latents=torch.from_numpy(noise), output_type="np", **options).images
    ours = generate(base, ["a dog"], [3], steps=3, guidance=5.0, height=32, width=32)
    assert np.abs(ours - np.round(255 * theirs)).max() <= 1
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (1, 32, 32, 3)), jnp.float32)
    latents = base.model.encode_image(base.params["vae"], images).mean
    again = base.model.decode_latent(base.params["vae"], latents)
    plain = load_base_model(xl_folder)
    expected = plain.model.decode_latent(
        plain.params["vae"], plain.model.encode_image(plain.params["vae"], images).mean
    )
    np.testing.assert_allclose(again, expected, atol=1e-4)
