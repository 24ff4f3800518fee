"""Score the text-to-image model: `python -m perfusion_jax.emoji_world.score_model --model=FOLDER`.

Prints one table: the evaluator's own accuracy on rendered scenes (the ceiling), how often it finds the asked-for
category, place or pair of objects in generated pictures, and how well the autoencoder reconstructs.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from absl import app, flags
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel

from perfusion_jax.emoji_world import (
    autoencoder_training,
    captions,
    catalogue,
    clip_training,
    drawings,
    evaluator,
    model_folder,
    scenes,
    tokenizer,
    torch_training,
)
from perfusion_jax.emoji_world.fetch import cache_directory

MODEL = flags.DEFINE_string("model", None, "Stable Diffusion folder; by default the one that pretraining wrote last.")
GUIDANCE = flags.DEFINE_list("guidance", ["3", "5", "7"], "Guidance scales to compare.")
STEPS = flags.DEFINE_integer("steps", 50, "DDIM steps.")
SEEDS = flags.DEFINE_integer("seeds", 2, "Pictures of each category at each place.")

TEST_SEED = 9_002
PLACES_A_CATEGORY = 4
PAIRS = 56


def single_requests(seeds: int) -> list[tuple[str, str]]:
    """(category, place) of every one-object prompt: each category at four places, the places taken in turn."""
    places = itertools.cycle(catalogue.PLACES)
    pairs = [(category, next(places)) for category in catalogue.CATEGORIES for _ in range(PLACES_A_CATEGORY)]
    return [pair for pair in pairs for _ in range(seeds)]


def pair_requests(seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of different categories, chosen by a fixed seed."""
    random = np.random.default_rng(seed)
    return [tuple(random.choice(catalogue.CATEGORIES, 2, replace=False).tolist()) for _ in range(PAIRS)]


def score_pictures(
    pictures: np.ndarray,
    answers: list[set[str]],
    names: Sequence[str],
    classes: np.ndarray,
    embed_images: Callable[[np.ndarray], np.ndarray],
    count: int = 1,
) -> float:
    """Share of pictures whose `count` best classes are the right ones.

    Args:
        pictures: uint8 [pictures, 64, 64, 3].
        answers: a set of names for each picture.
        names: the classes' names.
        classes: float [classes, width], of `evaluator.class_embeddings`.
    """
    ranks = evaluator.rank_classes(embed_images(pictures), classes)
    found = [{names[index] for index in row[:count]} for row in ranks]
    return float(np.mean([one == other for one, other in zip(found, answers, strict=True)]))


def main(_: list[str]) -> None:
    """Prints the scores."""
    folder = MODEL.value or cache_directory() / "diffusion_training" / "model"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    clip = CLIPModel.from_pretrained(cache_directory() / "clip").float().eval()
    text_tokenizer = tokenizer.load_tokenizer(cache_directory() / "clip")

    def embed_texts(texts: list[str]) -> np.ndarray:
        return clip_training.embed_texts(clip, text_tokenizer, texts)

    def embed_images(images: np.ndarray) -> np.ndarray:
        return clip_training.embed_images(clip, images)

    category_classes = evaluator.class_embeddings(
        embed_texts, [evaluator.category_prompts(name) for name in catalogue.CATEGORIES]
    )
    place_classes = evaluator.class_embeddings(
        embed_texts, [evaluator.place_prompts(name) for name in catalogue.PLACES]
    )
    ceiling = clip_training.measure(clip, text_tokenizer, TEST_SEED, 2_000)
    print(f"evaluator on rendered scenes: category {ceiling['category']:.1%}, place {ceiling['place']:.1%}")

    sprites = drawings.world_sprites()
    fresh = np.stack([scenes.render_scene(TEST_SEED + 1, index, sprites).image for index in range(500)])
    psnr = autoencoder_training.mean_psnr(fresh, autoencoder_training.reconstruct(pipeline.vae, fresh))
    print(f"autoencoder on 500 fresh scenes: {psnr:.2f} dB")

    requests, pairs = single_requests(SEEDS.value), pair_requests()
    prompts = [
        f"a photo of {captions.noun_phrase(category)} {captions.place_phrase(place)}" for category, place in requests
    ]
    pair_prompts = [f"a photo of {' and '.join(map(captions.noun_phrase, pair))}" for pair in pairs]
    for guidance in map(float, GUIDANCE.value):
        pictures = model_folder.sample(pipeline, prompts, seed=0, steps=STEPS.value, guidance_scale=guidance)
        both = model_folder.sample(pipeline, pair_prompts, seed=1_000, steps=STEPS.value, guidance_scale=guidance)
        category = score_pictures(
            pictures, [{category} for category, _ in requests], catalogue.CATEGORIES, category_classes, embed_images
        )
        place = score_pictures(
            pictures, [{place} for _, place in requests], catalogue.PLACES, place_classes, embed_images
        )
        pair = score_pictures(both, list(map(set, pairs)), catalogue.CATEGORIES, category_classes, embed_images, 2)
        print(f"guidance {guidance:g}: category {category:.1%}, place {place:.1%}, both of two objects {pair:.1%}")
        torch_training.save_grid(cache_directory() / f"score_guidance_{guidance:g}.png", pictures[:: SEEDS.value], 16)


if __name__ == "__main__":
    app.run(main)
