"""Run by test_fleet_step.py in a process with eight devices: trains a fleet on meshes, and each concept alone.

Writes the states to OUT.npz and the collectives of the compiled steps to OUT.json.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from collectives import collectives
from test_step import PROMPTS, SIDE, make_metric

from perfusion_jax import load_base_model
from perfusion_jax.config import make_config
from perfusion_jax.data.examples import Examples
from perfusion_jax.learning import fleet_step
from perfusion_jax.learning import step as training
from perfusion_jax.pod import mesh as mesh_lib
from perfusion_jax.pod import slots as slots_lib

MESHES = ((8, 1), (4, 2), (2, 4))
SETTINGS = training.Settings.of(make_config(batch_size=8, accumulation=2))
CONCEPTS = 12
DIVERGES = 5
PICTURES = 8  # that the examples are padded to


def make_member(base, whitening, number):
    """A concept of 3, 5 or 7 pictures: (examples, learning, key, steps to take)."""
    rng = np.random.default_rng(number)
    count = 3 + 2 * (number // 3 % 3)
    shape = (count, 2, SIDE, SIDE, base.model.latent_channels)
    mean = rng.standard_normal(shape)
    if number == DIVERGES:
        mean[:] = np.inf
    masks = rng.uniform(0, 1, shape[:-1])
    examples = Examples(
        mean=jnp.asarray(mean, jnp.float32),
        std=jnp.asarray(rng.uniform(0, 0.1, shape), jnp.float32),
        masks=jnp.asarray(masks / masks.max(axis=(2, 3), keepdims=True), jnp.float32),
        sizes=jnp.asarray(rng.integers(0, 100, (count, 6)), jnp.float32),
        prompt_ids=jnp.asarray(np.tile(base.model.tokenizer(PROMPTS, ["<rex>"]), (count, 1, 1))),
        num_pictures=jnp.int32(count),
    )
    word = ("dog", "cat", "teddy bear")[number % 3]
    return (
        examples,
        training.start(base.new_concept(word, whitening), SETTINGS),
        jax.random.fold_in(jax.random.key(0), number),
        2 + number % 3,
    )


def train_fleet(step, params, whitening, members, learning, steps):
    losses = []
    for _ in range(steps):
        learning, loss = step(params, whitening, members, learning)
        losses.append(loss)
    return learning, np.stack([np.asarray(loss) for loss in losses])


def main(folder, out):
    base = load_base_model(folder)
    _, whitening = make_metric(base)
    concepts = [make_member(base, whitening, number) for number in range(CONCEPTS)]
    steps = max(limit for *_, limit in concepts) + 1
    arrays, sent = {}, {}

    alone = jax.jit(functools.partial(training.train_step, base.model, settings=SETTINGS))
    for number, (examples, learning, key, limit) in enumerate(concepts):
        for _ in range(limit):
            learning, _ = alone(base.params, whitening, examples, learning, key)
        for place, leaf in enumerate(jax.tree.leaves(learning)):
            arrays[f"alone/{number}/{place}"] = np.asarray(leaf)

    shapes = fleet_step.member_shapes(base.model, SETTINGS, PICTURES, len(PROMPTS), SIDE * base.model.vae_factor)
    for mesh_shape in MESHES:
        mesh = mesh_lib.make_mesh(mesh_shape)
        slots = -(-CONCEPTS // mesh_shape[0]) * mesh_shape[0]
        frozen = {name: base.params[name] for name in fleet_step.step_components(base.model)}
        params = mesh_lib.place(frozen, mesh)
        step = (
            fleet_step.make_fleet_step(base.model, SETTINGS, mesh)
            .lower(*fleet_step.step_shapes(base.model, shapes, slots))
            .compile()
        )
        name = "x".join(map(str, mesh_shape))
        sent[name] = collectives(step.as_text())
        rows = {
            slot: (
                fleet_step.Members(
                    fleet_step.pad_pictures(examples, PICTURES), np.asarray(jax.random.key_data(key)), np.int32(limit)
                ),
                learning,
            )
            for slot, (examples, learning, key, limit) in enumerate(concepts)
        }
        metric = mesh_lib.place(whitening, mesh)
        for run in ("once", "again"):
            members, learning = slots_lib.stack_members(rows, shapes, slots, mesh)
            learning, losses = train_fleet(step, params, metric, members, learning, steps)
            states = slots_lib.read_members(learning, range(slots))
            for number, state in states.items():
                for place, leaf in enumerate(jax.tree.leaves(state)):
                    arrays[f"{name}/{run}/{number}/{place}"] = leaf
            arrays[f"{name}/{run}/losses"] = losses
    np.savez(f"{out}.npz", **arrays)
    with open(f"{out}.json", "w") as file:
        json.dump(sent, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
