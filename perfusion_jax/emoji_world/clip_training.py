"""The evaluator CLIP: its shape, one training step, its embeddings and its accuracy on rendered scenes."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from perfusion_jax.emoji_world import catalogue, drawings, evaluator, scenes, tokenizer, torch_training
from perfusion_jax.emoji_world.muon import MuonAndAdam
from perfusion_jax.emoji_world.scenes import Scene, render_scene

WIDTH = 128


def build_clip(text_tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIPModel for 64-pixel pictures in 8-pixel patches: about 1.5 million parameters."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = CLIPTextConfig(
        vocab_size=len(text_tokenizer),
        num_hidden_layers=3,
        max_position_embeddings=tokenizer.MODEL_MAX_LENGTH,
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        **shared,
    )
    vision = CLIPVisionConfig(image_size=scenes.PIXELS, patch_size=8, num_hidden_layers=4, **shared)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    model = CLIPModel(config)
    model.set_attn_implementation("eager")  # faster to train on a CPU: see `diffusion_training.make_trainer`
    return model


def soften(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur half of the pictures a little and add faint noise, so that a soft picture is judged by what it shows.

    Args:
        images: float [batch, 3, 64, 64] in [-1, 1].
    """
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    noise = torch.randn(images.shape, generator=generator)
    strength = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return torch.where(chosen, blurred, images) + strength * noise


WORDS = (*catalogue.CATEGORIES, *catalogue.OTHERS)


def word_targets(batch: Sequence[Scene]) -> torch.Tensor:
    """Which words name each scene's things: float [batch, len(WORDS)], rows that sum to 1, or to 0 for an empty
    place.
    """
    targets = torch.zeros(len(batch), len(WORDS))
    for row, scene in zip(targets, batch, strict=True):
        for thing in scene.description.things:
            row[WORDS.index(thing.category)] = 1 / len(scene.description.things)
    return targets


def train_step(
    model: CLIPModel,
    optimizer: MuonAndAdam,
    factor: float,
    images: torch.Tensor,
    tokens: torch.Tensor,
    word_tokens: torch.Tensor,
    targets: torch.Tensor,
) -> float:
    """One step on CLIP's symmetric contrastive loss, and on that of each picture against every word; returns the loss.

    Within a batch, place and colours nearly always tell a caption apart: without the second part, what the thing is
    would be learnt late.

    Args:
        images: float [batch, 3, 64, 64] in [-1, 1].
        tokens: of the captions, int [batch, 24].
        word_tokens: of "a photo of a ..." for each of WORDS, int [words, 24].
        targets: of `word_targets`, float [batch, words].
    """
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=torch.cat([tokens, word_tokens]), pixel_values=images)
    scores, word_scores = output.logits_per_image.float().split([len(tokens), len(word_tokens)], dim=1)
    # Two scenes with the same caption are both right answers to it.
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    pairs = same / same.sum(1, keepdim=True)
    loss = 0.5 * (functional.cross_entropy(scores, pairs) + functional.cross_entropy(scores.T, pairs))
    loss = loss + functional.cross_entropy(word_scores, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(factor)
    return loss.item()


@torch.no_grad()
def embed_texts(model: CLIPModel, text_tokenizer: CLIPTokenizer, texts: list[str]) -> np.ndarray:
    """Unit vectors of texts: float array [texts, width]."""
    tokens = torch.tensor(tokenizer.encode(text_tokenizer, texts))
    return functional.normalize(model.get_text_features(tokens).float(), dim=-1).numpy()


@torch.no_grad()
def embed_images(model: CLIPModel, images: np.ndarray, batch_size: int = 128) -> np.ndarray:
    """Unit vectors of uint8 images [count, 64, 64, 3]: float array [count, width]."""
    batches = (
        torch_training.from_pixels(images[start : start + batch_size]) for start in range(0, len(images), batch_size)
    )
    features = torch.cat([model.get_image_features(batch).float() for batch in batches])
    return functional.normalize(features, dim=-1).numpy()


def make_judge(model: CLIPModel, text_tokenizer: CLIPTokenizer) -> evaluator.Judge:
    """The evaluator as it is now."""
    return evaluator.Judge(
        lambda images: embed_images(model, images), lambda texts: embed_texts(model, text_tokenizer, texts)
    )


def measure(judge: evaluator.Judge, seed: int, count: int) -> dict[str, float]:
    """Share of fresh rendered scenes that the judge answers rightly, of sequence `seed`, `count` of each kind.

    Returns:
        {"category", "place": of scenes of one category in a place; "pair": both things of two-object scenes}.
    """
    alone, together = list(fresh_scenes(seed, 1, count)), list(fresh_scenes(seed, 2, count))
    pictures = np.stack([scene.image for scene in alone])
    return {
        "category": evaluator.share_right(judge.find_categories(pictures), list(map(categories_of, alone))),
        "place": evaluator.share_right(judge.find_places(pictures), [scene.description.place for scene in alone]),
        "pair": evaluator.share_right(
            judge.find_categories(np.stack([scene.image for scene in together]), 2), list(map(categories_of, together))
        ),
    }


def categories_of(scene: Scene) -> set[str]:
    """What a scene shows."""
    return {thing.category for thing in scene.description.things}


def fresh_scenes(seed: int, things: int, count: int) -> Iterator[Scene]:
    """The first `count` scenes of sequence `seed` that show `things` of `catalogue.CATEGORIES` in a place."""
    sprites = drawings.world_sprites()
    rendered = (render_scene(seed, index, sprites) for index in itertools.count())
    chosen = (
        scene
        for scene in rendered
        if scene.description.place in catalogue.PLACES
        and len(scene.description.things) == things
        and categories_of(scene) <= set(catalogue.CATEGORIES)
    )
    return itertools.islice(chosen, count)
