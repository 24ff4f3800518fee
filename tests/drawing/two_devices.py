"""Run by test_mesh.py in a process with two devices: draws alone and shared, and prints the largest difference."""

import dataclasses
import sys

import jax
import numpy as np
from exported import learnt
from jax.sharding import AxisType, Mesh

from perfusion_jax import generate, load_base_model
from perfusion_jax.formats.concept_file import TrainedConcept
from perfusion_jax.method import baselines
from perfusion_jax.pod.mesh import place

SMALL = {"steps": 3, "height": 32, "width": 32, "batch_size": 2}
WAYS = {
    "guided": {},
    "unguided": {"guidance": 1.0},
    "noise put back": {"sampler": "euler_a"},
    "unguided, noise put back": {"sampler": "euler_a", "guidance": 1.0},
    "global": {"lock": "global"},
}


def main() -> None:
    base = load_base_model(sys.argv[1])
    assert jax.device_count() == 2
    rex = learnt(base, "rex", "dog")
    key, embedding = jax.random.key(0), base.super_category_embedding("cat")
    word = baselines.begin("lora", base.params["unet"], embedding, key)
    tom = TrainedConcept(jax.tree.map(lambda leaf: leaf + 0.1, word), learnt(base, "tom", "cat").card)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    shared = dataclasses.replace(base, params=place(base.params, mesh))
    for way, options in WAYS.items():
        for concept in (rex, tom):
            prompts, seeds = [f"a photo of a {concept.card.placeholder}"] * 3, range(3)
            alone = generate(base, prompts, seeds, [concept], **options, **SMALL)
            together = generate(shared, prompts, seeds, [concept], mesh=mesh, **options, **SMALL)
            print(f"{way}, {concept.card.name}: {np.abs(alone.astype(int) - together).max()}")


if __name__ == "__main__":
    main()
