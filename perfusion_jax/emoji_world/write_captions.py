"""Write captions of scenes, one on a line: `python -m perfusion_jax.emoji_world.write_captions --out captions.txt`.

They are what the covariance of the model's text encodings is measured on (`perfusion_jax.covariance`).
"""

import pathlib

import numpy as np
from absl import app, flags

from perfusion_jax.emoji_world import captions, catalogue, scenes

OUT = flags.DEFINE_string("out", None, "Text file to write.", required=True)
COUNT = flags.DEFINE_integer("count", 100_000, "How many.")

SEED = 4_000


def scene_captions(seed: int, count: int) -> list[str]:
    """Captions of the first `count` scenes of sequence `seed`. Nothing is drawn."""
    drawings = {word: len(catalogue.vendors_of(word)) for word in (*catalogue.CATEGORIES, *catalogue.OTHERS)}
    texts = []
    for index in range(count):
        random = np.random.default_rng([seed, index])
        texts.append(captions.write_caption(scenes.invent(random, drawings), random))
    return texts


def main(_: list[str]) -> None:
    """Writes the file."""
    pathlib.Path(OUT.value).write_text("\n".join(scene_captions(SEED, COUNT.value)) + "\n")


if __name__ == "__main__":
    app.run(main)
