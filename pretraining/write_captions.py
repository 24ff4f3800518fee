"""Write captions of the world, to measure the covariance of text encodings: `python -m pretraining.write_captions`."""

import pathlib

import numpy as np
from absl import app, flags

from pretraining import captions, scenes, things

OUT = flags.DEFINE_string("out", "captions.txt", "File to write, a caption a line.")
COUNT = flags.DEFINE_integer("count", 100_000, "Captions (the paper used 100,000).")

SEED = 5_000
BATCH = 500


def main(_: list[str]) -> None:
    """Writes the captions of scenes that no training used."""
    atlas = things.atlas()
    planner = scenes.Planner(atlas)
    # Without codes, and with the nouns that stand by them in training: whoever calls his own thing an object is to find
    # the covariance aware of the word.
    writer = captions.Writer(atlas, coded_share=0, nameless_share=captions.CODED_NAMELESS_SHARE / 2)
    lines: list[str] = []
    for step in range(-(-COUNT.value // BATCH)):
        plan, random = planner.plan(SEED, step, BATCH), np.random.default_rng([SEED, step])
        lines += map(str, writer.write(plan, writer.codable(plan, random), random))
    pathlib.Path(OUT.value).write_text("".join(f"{line}\n" for line in lines[: COUNT.value]))


if __name__ == "__main__":
    app.run(main)
