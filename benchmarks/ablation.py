"""What each part of the method is for, on the embedded model: `python benchmarks/ablation.py --out ablation`.

Learns four example concepts in every variant, with fixed seeds, draws each in places that its pictures do not show, and
prints image and text similarity by the embedded evaluator. Finished runs are kept in --out and not done again.
"""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from etils import epath

sys.path.insert(0, str(Path(__file__).parents[1]))

from unseen import draw_and_score, example_concept

from perfusion_jax import load_base_model
from perfusion_jax.base_model.clip import load_clip
from perfusion_jax.drawing.grids import grid
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.runtime import shipped

OUT = flags.DEFINE_string("out", "ablation", "Folder of the runs and pictures.")
CONCEPTS = flags.DEFINE_list("concepts", ["dog", "teddy", "jeep", "camera"], "Examples to learn.")
SEEDS = flags.DEFINE_integer("seeds", 4, "Pictures of each concept in each place.")

VARIANTS = {
    "full method": {},
    "no lock": {"lock_keys": False},
    "no mask": {"masks": "none"},
    "embedding only": {"method": "textual_inversion", "embedding_rate": 0.006, "steps": 400},
}


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes
    out = epath.Path(OUT.value)
    base, clip = load_base_model("emoji"), load_clip(shipped.EVALUATOR)
    print("| variant | image similarity | text similarity | prompt precision |\n| --- | --- | --- | --- |")
    for variant, changes in VARIANTS.items():
        folder = out / variant.replace(" ", "_")
        scores, rows = [], []
        for name in CONCEPTS.value:
            with contextlib.redirect_stdout(io.StringIO()):
                # The last step of every variant, not the best one by the measure that is reported.
                trained = example_concept(base, name, folder / name, validate_every=0, **changes)
            drawn, own, scored = draw_and_score(base, clip, trained, SEEDS.value)
            scores.append(scored)
            rows.append(np.concatenate([own[:1], drawn[:: SEEDS.value]]))
        write_picture(folder.with_suffix(".png"), grid(rows))
        print(f"| {variant} | {' | '.join(f'{mean:.3f}' for mean in np.mean(scores, axis=0))} |", flush=True)


if __name__ == "__main__":
    app.run(main)
