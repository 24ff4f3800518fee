"""The instance encoder: which individual is in a picture, wherever it stands?

As DINO stands beside CLIP in DreamBench. A small vision transformer in transformers' ViT layout; the embedding is the
encoding of the class token. Trained by contrast alone: two scenes of one individual, in other places, sizes and
company, against scenes of other individuals, many of them of the same kind or the same drawing in other colours.
"""

import dataclasses

import numpy as np
import torch
from torch.nn import functional
from transformers import ViTConfig, ViTModel

from perfusion_jax.emoji_world.muon import MuonAndAdam
from pretraining import individuals, places, scenes, training_tools

FAMILIES, MEMBERS = 24, 4
"""A batch holds so many kinds and so many individuals of each, in two scenes each."""

COMPANY_SHARE = 0.3
"""Share of the scenes in which another thing stands."""

TEMPERATURE = 0.1

LEAST_APART = 0.08
"""Mean difference of colours, of 1, between two individuals that are one drawing: two thirds of what tests ask
(`held_out.LEAST_APART`). Nearer ones would differ by their bend alone, as a drawn picture differs from its thing."""

TRIES = 8
"""How often members that are nearer are invented anew; of grey drawings some stay near."""

BEND = 0.006
"""Deviation of what bends an individual's second scene otherwise than its first: a third of what individuals have."""


def build_encoder() -> ViTModel:
    """An untrained encoder of 64-pixel pictures in 8-pixel patches: about 1.6 million parameters."""
    config = ViTConfig(
        image_size=scenes.PIXELS,
        patch_size=8,
        hidden_size=160,
        num_hidden_layers=5,
        num_attention_heads=5,
        intermediate_size=640,
    )
    model = ViTModel(config, add_pooling_layer=False)
    model.set_attn_implementation("eager")  # faster to train on a CPU: see `diffusion.make_trainer`
    return model


def too_alike(people: individuals.Individuals, areas: torch.Tensor) -> torch.Tensor:
    """Which members of families have nearly the colours of one before them that is the same drawing: bool [count].

    Args:
        people: MEMBERS of each family one after the other.
        areas: float [drawings, parts], `Planner.areas`.
    """
    of_family = people.drawing.unflatten(0, (-1, MEMBERS))
    colours, shares = people.colours.unflatten(0, (-1, MEMBERS)), areas[people.drawing].unflatten(0, (-1, MEMBERS))
    away = ((colours[:, :, None] - colours[:, None]).abs().mean(-1) * shares[:, :, None]).sum(-1)
    near = (away < LEAST_APART) & (of_family[:, :, None] == of_family[:, None])
    return near.tril(-1).any(-1).flatten()


def family_plan(planner: scenes.Planner, seed: int, step: int) -> scenes.Plan:
    """Scenes of FAMILIES x MEMBERS individuals: first one of each, then another of each in the same order.

    The individual of scene i is its last thing, and may be cut by the edge or stand beside another.
    """
    generator = training_tools.generator(seed, step)
    leaders = torch.multinomial(planner.weights, FAMILIES, replacement=True, generator=generator)
    same_kind = (planner.kind[leaders][:, None] == planner.kind[None]).double() * planner.weights
    drawing = torch.multinomial(same_kind, MEMBERS, replacement=True, generator=generator)
    # In half of the families all members are one drawing, so that colours and shape alone tell them apart.
    alike = torch.rand(FAMILIES, 1, generator=generator) < 0.5
    drawing = torch.where(alike, leaders[:, None], drawing).flatten()
    people = individuals.invent(planner.colours, drawing, generator)
    for _ in range(TRIES):
        (near,) = torch.nonzero(too_alike(people, planner.areas), as_tuple=True)
        if not len(near):
            break
        people = individuals.replaced(people, near, individuals.invent(planner.colours, drawing[near], generator))
    count = len(drawing)
    both = torch.arange(count).repeat(2)
    company = torch.rand(2 * count, generator=generator) < COMPANY_SHARE
    total = 1 + company.long()
    first = (torch.rand(2 * count, generator=generator) < 0.5).long()  # on the left or on the right of its company
    mine = planner.views(total, torch.where(company, first, 0), generator)
    others = torch.multinomial(planner.weights, int(company.sum()), replacement=True, generator=generator)
    theirs = planner.views(total[company], 1 - first[company], generator)
    # Company comes first in each scene, so that it stands behind.
    order = torch.cat([torch.nonzero(company)[:, 0].double() - 0.5, torch.arange(2 * count).double()]).argsort()

    again = people.warp + BEND * torch.randn(people.warp.shape, generator=generator)
    twice = dataclasses.replace(people[both], warp=torch.cat([people.warp, again]))

    def merged(left: object, right: object, make: type) -> object:
        fields = dataclasses.fields(make)
        return make(*(torch.cat([getattr(left, f.name), getattr(right, f.name)])[order] for f in fields))

    scene = torch.cat([torch.nonzero(company)[:, 0], torch.arange(2 * count)])[order]
    slot = torch.cat([torch.zeros(len(others), dtype=torch.long), company.long()])[order]
    return scenes.Plan(
        things=merged(individuals.invent(planner.colours, others, generator), twice, individuals.Individuals),
        views=merged(theirs, mine, scenes.Views),
        scene=scene,
        slot=slot,
        worn=torch.zeros(len(scene), dtype=torch.bool),
        backgrounds=places.invent(2 * count, generator),
        styles=torch.zeros(2 * count, dtype=torch.long),
    )


def soften(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur half of the pictures a little and add faint noise, so that a soft picture is judged by what it shows.

    Args:
        pictures: float [batch, 3, PIXELS, PIXELS] in [-1, 1].
        generator: on the CPU.
    """
    device, count = pictures.device, len(pictures)
    blurred = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    chosen = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    noise = training_tools.normal(pictures.shape, generator, device)
    strength = 0.1 * torch.rand(count, 1, 1, 1, generator=generator).to(device)
    return torch.where(chosen.to(device), blurred, pictures) + strength * noise


def contrast(embeddings: torch.Tensor) -> torch.Tensor:
    """NT-Xent (arXiv 2002.05709) of float [2 * count, width], of which rows i and count + i are of one individual."""
    unit = functional.normalize(embeddings.float(), dim=-1)
    count = len(unit) // 2
    scores = (unit @ unit.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * count, device=unit.device).roll(count)
    return functional.cross_entropy(scores, partner)


def train_step(model: ViTModel, optimizer: MuonAndAdam, factor: float, pictures: torch.Tensor) -> torch.Tensor:
    """One step on scenes as of `family_plan`; returns the loss."""
    with training_tools.autocast(pictures.device):
        embeddings = model(pixel_values=pictures).last_hidden_state[:, 0]
    loss = contrast(embeddings)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(factor)
    return loss.detach()


@torch.no_grad()
def embed(model: ViTModel, pictures: torch.Tensor, batch_size: int = 256) -> np.ndarray:
    """Unit vectors of float pictures [count, 3, PIXELS, PIXELS] in [-1, 1]: float32 [count, width]."""
    encoded = [model(pixel_values=some).last_hidden_state[:, 0].float() for some in pictures.split(batch_size)]
    return functional.normalize(torch.cat(encoded), dim=-1).cpu().numpy()


def share_found(embeddings: np.ndarray, owners: np.ndarray, references: np.ndarray) -> float:
    """Share of pictures whose nearest individual is their own.

    Args:
        embeddings: float [pictures, width].
        owners: int [pictures], the individual that each should show.
        references: float [individuals, pictures of each, width]; an individual's nearness is the mean cosine with its
            pictures.
    """
    nearness = np.einsum("pw,irw->pi", embeddings, references) / references.shape[1]
    return float((nearness.argmax(1) == owners).mean())
