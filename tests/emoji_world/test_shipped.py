"""What ships: the small model draws what it is asked for, in both frameworks alike, and its judge knows."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from perfusion_jax import load_base_model
from perfusion_jax.base_model.clip import load_clip
from perfusion_jax.data.folders import read_folder
from perfusion_jax.drawing.denoising import noise_for
from perfusion_jax.drawing.generation import generate
from perfusion_jax.emoji_world import captions, catalogue, evaluator, make_examples
from perfusion_jax.formats.covariance_file import load_covariance
from perfusion_jax.runtime import shipped

GUIDANCE = 4.0


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def emoji():
    return load_base_model("emoji")


@pytest.fixture(scope="module")
def judge():
    clip = load_clip(shipped.EVALUATOR)
    return evaluator.Judge(clip.images, clip.texts)


def test_sizes():
    assert size(shipped.MODEL) <= 25e6
    assert size(shipped.EVALUATOR) <= 10e6


def test_draws_what_it_is_asked_for(emoji, judge):
    asked = [
        ("dog", "beach"),
        ("penguin", "snow"),
        ("owl", "night"),
        ("burger", "table"),
        ("pig", "grass"),
        ("car", "city"),
    ]
    prompts = [f"a photo of {captions.noun_phrase(thing)} {captions.place_phrase(place)}" for thing, place in asked]
    pictures = generate(emoji, prompts, range(6), steps=20, guidance=GUIDANCE, batch_size=6)
    right = evaluator.share_right(judge.find_categories(pictures), [{thing} for thing, _ in asked])
    assert right >= 4 / 6
    assert evaluator.share_right(judge.find_places(pictures), [place for _, place in asked]) >= 5 / 6


def test_pytorch_diffusers_draws_the_same(emoji):
    pipeline = StableDiffusionPipeline.from_pretrained(shipped.MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a photo of a dog on the beach", "a photo of a cat and an apple at night"]
    noise = np.asarray(noise_for(emoji.model, [0, 1], 64, 64))
    theirs = pipeline(
        prompts,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=10,
        guidance_scale=GUIDANCE,
        output_type="np",
    ).images
    ours = generate(emoji, prompts, [0, 1], steps=10, guidance=GUIDANCE, batch_size=2)
    assert np.abs(ours - 255 * theirs).max() <= 1.5


def test_the_covariance_came_along_and_can_be_inverted(emoji):
    covariance = load_covariance(emoji.covariance, emoji.model.context_width)
    assert np.linalg.cond(covariance) < 1e6


@pytest.mark.parametrize("name", make_examples.CONCEPTS)
def test_examples_have_pictures_masks_and_unseen_contexts(name):
    pictures = read_folder(shipped.EXAMPLES / name)
    assert 4 <= len(pictures) <= 6
    assert all(picture.mask is not None and 0.1 < picture.mask.mean() < 0.6 for picture in pictures)
    facts = json.loads((shipped.EXAMPLES / name / "concept.json").read_text())
    assert facts["super_category"] in catalogue.CATEGORIES
    assert not set(facts["shown"]) & set(facts["not_shown"])
    assert all(picture.pixels.shape == (64, 64, 3) for picture in pictures)
