"""Concepts for the tests of exports, and what we draw of their baked edit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax import generate
from perfusion_jax.formats.concept_file import ConceptCard, TrainedConcept

PROMPTS = ["a photo of a <rex> on the beach", "a dog in the snow"]
SEEDS = [3, 4]
STEPS = 5


def learnt(base, name="rex", word="dog", seed=0):
    """A concept that has gone some way from its super-category."""
    width = base.model.context_width
    factor = np.random.default_rng(7).standard_normal((width, width)) / width**0.5
    whitening = jnp.asarray(factor @ factor.T + np.eye(width), jnp.float32)
    concept = base.new_concept(word, whitening)
    keys = iter(jax.random.split(jax.random.key(seed), 100))

    def moved(leaf):
        return leaf + 0.3 * jnp.abs(leaf).mean() * jax.random.normal(next(keys), leaf.shape)

    concept = dataclasses.replace(
        concept,
        embedding=moved(concept.embedding),
        value_outputs={layer: moved(output) for layer, output in sorted(concept.value_outputs.items())},
    )
    concept = concept.with_target_input(moved(concept.target_input), whitening)
    card = ConceptCard(name, word, base.name, base.fingerprint, 0.6, 0.15, 6.0, 100, licence="cc0-1.0")
    return TrainedConcept(concept, card)


def drawn_baked(base, concepts, prompts=PROMPTS, strengths=(), **options):
    """Ours: the edit baked, and of the concepts the words alone."""
    baked = base.baked([concept for concept, _ in concepts], strengths or [1.0] * len(concepts))
    options = {"sampler": "ddim", "steps": STEPS, "height": 32, "width": 32, **options}
    return generate(baked, prompts, SEEDS, concepts, strength=0.0, **options)
