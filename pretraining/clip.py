"""The evaluator CLIP: its shape, one training step, and the questions that are put to it.

It sees rendered scenes and their captions only, never a generated picture, and shares no weight with the model that it
judges. Its vision tower begins as the instance encoder.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig, ViTModel

from perfusion_jax.emoji_world.muon import MuonAndAdam
from pretraining import captions, places, scenes, things, tokenizer, training_tools

WIDTH = 160

LARGEST_SCALE = 100
"""Of cosines, as in CLIP's training (arXiv 2103.00020, section 2.5)."""


def build_clip(text_tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIPModel for 64-pixel pictures in 8-pixel patches: about 3 million parameters."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 5, "projection_dim": WIDTH}
    text = CLIPTextConfig(
        vocab_size=len(text_tokenizer),
        num_hidden_layers=3,
        max_position_embeddings=tokenizer.MODEL_MAX_LENGTH,
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        **shared,
    )
    vision = CLIPVisionConfig(
        image_size=scenes.PIXELS, patch_size=8, num_hidden_layers=5, hidden_act="gelu", **shared
    )  # all as `instance.build_encoder` has it
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    model = CLIPModel(config)
    model.set_attn_implementation("eager")  # faster to train on a CPU: see `diffusion.make_trainer`
    return model


@torch.no_grad()
def begin_as(model: CLIPModel, encoder: ViTModel, pictures: torch.Tensor) -> None:
    """Gives the vision tower the weights of an instance encoder, which has learnt to look at things.

    Captions alone teach that late: places and colours tell most of them apart.

    Args:
        model: its vision tower is changed.
        encoder: of the same size.
        pictures: float [count, 3, PIXELS, PIXELS] in [-1, 1], by which the layer norm is set that CLIP has before its
            first layer and a ViT has not.
    """
    vision, embeddings = model.vision_model, encoder.embeddings
    positions = embeddings.position_embeddings[0].clone()
    positions[1:] += embeddings.patch_embeddings.projection.bias  # of which CLIP's have none
    vision.embeddings.class_embedding.copy_(embeddings.cls_token[0, 0])
    vision.embeddings.patch_embedding.weight.copy_(embeddings.patch_embeddings.projection.weight)
    vision.embeddings.position_embedding.weight.copy_(positions)
    # That layer norm gives every position its own deviation and mean back as far as one for all can.
    seen = embeddings(pictures)
    vision.pre_layrnorm.weight.fill_(seen.std(-1).mean())
    vision.pre_layrnorm.bias.fill_(seen.mean())
    for ours, theirs in zip(vision.encoder.layers, encoder.encoder.layer, strict=True):
        attention = theirs.attention
        for to, of in (
            (ours.layer_norm1, theirs.layernorm_before),
            (ours.self_attn.q_proj, attention.attention.query),
            (ours.self_attn.k_proj, attention.attention.key),
            (ours.self_attn.v_proj, attention.attention.value),
            (ours.self_attn.out_proj, attention.output.dense),
            (ours.layer_norm2, theirs.layernorm_after),
            (ours.mlp.fc1, theirs.intermediate.dense),
            (ours.mlp.fc2, theirs.output.dense),
        ):
            to.load_state_dict(of.state_dict())
    vision.post_layernorm.load_state_dict(encoder.layernorm.state_dict())


def kind_targets(plan: scenes.Plan, kinds_of_drawings: torch.Tensor) -> torch.Tensor:
    """Which kinds each scene shows: float [batch, kinds], rows that sum to 1, or to 0 for an empty place.

    Args:
        plan: the scenes.
        kinds_of_drawings: int [drawings], index in `things.kinds()`.
    """
    targets = torch.zeros(len(plan.styles), len(things.kinds()))
    shown = ~plan.worn
    targets[plan.scene[shown], kinds_of_drawings[plan.things.drawing[shown]]] = 1
    return targets / targets.sum(1, keepdim=True).clamp(min=1)


def train_step(
    model: CLIPModel,
    optimizer: MuonAndAdam,
    factor: float,
    pictures: torch.Tensor,
    tokens: torch.Tensor,
    word_tokens: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """One step on CLIP's symmetric contrastive loss, and on that of each picture against every word; returns the loss.

    Within a batch, place and colours nearly always tell a caption apart: without the second part, what the thing is
    would be learnt late.

    Args:
        pictures: float [batch, 3, PIXELS, PIXELS] in [-1, 1].
        tokens: of the captions, int [batch, length].
        word_tokens: of "a photo of a ..." for each of `things.kinds()`, int [kinds, length].
        targets: of `kind_targets`, float [batch, kinds].
    """
    with training_tools.autocast(pictures.device):
        output = model(input_ids=torch.cat([tokens, word_tokens]), pixel_values=pictures)
    # Cosines in float32: near 1 bfloat16 goes in steps of a 256th, four tenths of a logit at the largest scale.
    seen, read = (functional.normalize(each.float(), dim=-1) for each in (output.image_embeds, output.text_embeds))
    logits = model.logit_scale.exp() * seen @ read.T
    scores, word_scores = logits.split([len(tokens), len(word_tokens)], dim=1)
    # Two scenes with the same caption are both right answers to it.
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    pairs = same / same.sum(1, keepdim=True)
    loss = 0.5 * (functional.cross_entropy(scores, pairs) + functional.cross_entropy(scores.T, pairs))
    loss = loss + functional.cross_entropy(word_scores, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(factor)
    model.logit_scale.data.clamp_(max=math.log(LARGEST_SCALE))
    return loss.detach()


@torch.no_grad()
def embed_texts(model: CLIPModel, text_tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Unit vectors of texts: float [texts, width], on the model's device."""
    tokens = torch.tensor(tokenizer.encode(text_tokenizer, list(texts)), device=model.device)
    return functional.normalize(model.get_text_features(tokens).float(), dim=-1)


@torch.no_grad()
def embed_pictures(model: CLIPModel, pictures: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """Unit vectors of float pictures [count, 3, PIXELS, PIXELS] in [-1, 1]: float [count, width]."""
    features = torch.cat([model.get_image_features(some).float() for some in pictures.split(batch_size)])
    return functional.normalize(features, dim=-1)


def kind_phrases() -> list[str]:
    """A caption for each kind that names nothing else."""
    return [f"a photo of {captions.article(kind)} {kind}" for kind in things.kinds()]


def place_phrases() -> list[list[str]]:
    """For each place, captions of some common kinds there."""
    named = [entry.kind for entry in things.table() if entry.common]
    some = list(dict.fromkeys(named))[::6]
    return [
        [f"a photo of {captions.article(kind)} {kind} {places.PHRASES[place]}" for kind in some]
        for place in places.PLACES
    ]


def measure(
    model: CLIPModel, text_tokenizer: CLIPTokenizer, world: scenes.World, seed: int, count: int
) -> dict[str, float]:
    """Share of fresh rendered scenes that the evaluator answers rightly.

    Returns:
        {"category": of scenes of one thing, "place": of all in a named place, "pair": both things of two-thing scenes}.
    """
    kinds = embed_texts(model, text_tokenizer, kind_phrases())
    by_place = [embed_texts(model, text_tokenizer, phrases).mean(0) for phrases in place_phrases()]
    at = functional.normalize(torch.stack(by_place), dim=-1)
    right: dict[str, list[torch.Tensor]] = {"category": [], "place": [], "pair": []}
    for step in range(-(-count // 256)):
        plan = world.planner.plan(seed, step, 256)
        embedded = embed_pictures(model, world.draw(plan)[0])
        wanted = kind_targets(plan, world.planner.kind).to(embedded.device) > 0
        order = (embedded @ kinds.T).argsort(1, descending=True)
        alone, two = wanted.sum(1) == 1, wanted.sum(1) == 2
        right["category"].append(wanted.gather(1, order[:, :1])[alone, 0])
        right["pair"].append(wanted.gather(1, order[:, :2]).all(1)[two])
        name = plan.backgrounds.name.to(embedded.device)
        named = (name >= 0) & (name < len(places.PLACES))
        right["place"].append(((embedded @ at.T).argmax(1) == name)[named])
    return {question: float(torch.cat(answers).float().mean()) for question, answers in right.items()}


def found_kinds(model: CLIPModel, text_tokenizer: CLIPTokenizer, pictures: torch.Tensor) -> np.ndarray:
    """The kind that each picture resembles most: int [count], index in `things.kinds()`."""
    kinds = embed_texts(model, text_tokenizer, kind_phrases())
    return (embed_pictures(model, pictures) @ kinds.T).argmax(1).cpu().numpy()
