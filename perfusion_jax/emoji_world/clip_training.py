"""The evaluator CLIP: its shape, one training step, its embeddings and its accuracy on rendered scenes."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from perfusion_jax.emoji_world import catalogue, drawings, evaluator, scenes, tokenizer, torch_training
from perfusion_jax.emoji_world.muon import MuonAndAdam

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


def train_step(
    model: CLIPModel, optimizer: MuonAndAdam, factor: float, images: torch.Tensor, tokens: torch.Tensor
) -> float:
    """One step on the symmetric contrastive loss; returns the loss.

    Args:
        images: float [batch, 3, 64, 64] in [-1, 1].
        tokens: int [batch, 24].
    """
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=tokens, pixel_values=images)
    scores = output.logits_per_image.float()
    # Two scenes with the same caption are both right answers to it.
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    targets = same / same.sum(1, keepdim=True)
    loss = 0.5 * (functional.cross_entropy(scores, targets) + functional.cross_entropy(scores.T, targets))
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


def measure(model: CLIPModel, text_tokenizer: CLIPTokenizer, seed: int, count: int) -> dict[str, float]:
    """Zero-shot accuracy on fresh one-object scenes in real places: {"category": share right, "place": share right}."""
    sprites = drawings.world_sprites()
    rendered = (scenes.render_scene(seed, index, sprites) for index in range(3 * count))
    chosen = [
        scene
        for scene in rendered
        if len(scene.description.things) == 1 and scene.description.place in catalogue.PLACES
    ][:count]
    embeddings = embed_images(model, np.stack([scene.image for scene in chosen]))

    def accuracy(names: Sequence[str], prompts: Callable[[str], list[str]], answers: list[str]) -> float:
        classes = evaluator.class_embeddings(
            lambda texts: embed_texts(model, text_tokenizer, texts), [prompts(name) for name in names]
        )
        first = evaluator.rank_classes(embeddings, classes)[:, 0]
        return float(np.mean([names[guess] == answer for guess, answer in zip(first, answers, strict=True)]))

    categories = [scene.description.things[0].category for scene in chosen]
    places = [scene.description.place for scene in chosen]
    return {
        "category": accuracy(catalogue.CATEGORIES, evaluator.category_prompts, categories),
        "place": accuracy(catalogue.PLACES, evaluator.place_prompts, places),
    }
