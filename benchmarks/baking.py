"""What baking loses, on the embedded model: pictures of the gated edit beside those of plain weights.

    python benchmarks/baking.py --out baking

Learns example concepts with the defaults, draws each by 20 prompts with the gated edit, with the edit baked at strength
1, at the strength of `--fit_scale` and at some others, from the same noise; prints similarities by the judges that
training has by default, and how far pictures are from those of the gated edit, with intervals over concepts. What is
learnt and drawn is kept in --out and not done again.
"""

import contextlib
import io
import math
from collections.abc import Sequence

import numpy as np
from absl import app, flags, logging
from etils import epath
from unseen import example_concept, own_pictures

from perfusion_jax import generate, load_base_model
from perfusion_jax.base_model import BaseModel
from perfusion_jax.config import make_config
from perfusion_jax.drawing.grids import grid
from perfusion_jax.evaluation.scores import PROMPTS
from perfusion_jax.evaluation.statistics import estimate
from perfusion_jax.formats.concept_file import TrainedConcept
from perfusion_jax.formats.exporting import fitted_strengths
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.judges import find_judges, open_judges
from perfusion_jax.learning.metrics import Scores, score_pictures
from perfusion_jax.runtime import shipped

OUT = flags.DEFINE_string("out", "baking", "Folder of the runs and pictures.")
CONCEPTS = flags.DEFINE_list("concepts", [], "Examples to learn; all, at most eight, if left out.")

MOST = 8
STRENGTHS = (0.6, 0.8, 1.0, 1.2)
FITTED = "baked, --fit_scale"


def draw(base: BaseModel, trained: TrainedConcept, strength: float | None) -> np.ndarray:
    """Pictures of all prompts: by the gated edit, or baked at a strength. uint8 [prompts, height, width, 3]."""
    prompts = [prompt.replace("{}", trained.card.placeholder) for prompt in PROMPTS]
    if strength is None:
        return generate(base, prompts, range(len(prompts)), [trained], batch_size=len(prompts))
    plain = base.baked([trained.concept], [strength])
    # Of the concept the word alone: its edit is in the weights.
    return generate(plain, prompts, range(len(prompts)), [trained], strength=0.0, batch_size=len(prompts))


def learn(base: BaseModel, name: str, workdir: epath.Path) -> TrainedConcept:
    """Learns an example; what training prints is shown if it fails."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            return example_concept(base, name, workdir)
    except BaseException:
        print(told.getvalue())
        raise


def drawn_once(base: BaseModel, trained: TrainedConcept, file: epath.Path) -> tuple[float, dict[str, np.ndarray]]:
    """The strength of `--fit_scale`, and pictures by each variant of the edit; kept in `file`."""
    if file.exists():
        with np.load(file) as kept:
            return float(kept["fit"]), {name: kept[name] for name in kept.files if name != "fit"}
    (fit,) = fitted_strengths(base, [trained])
    variants = {"gated": None, **{f"baked, {s:g}": s for s in STRENGTHS}, FITTED: fit}
    drawn = {variant: draw(base, trained, strength) for variant, strength in variants.items()}
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, fit=fit, **drawn)
    partial.rename(file)
    return float(fit), drawn


def cell(values: Sequence[float], digits: int) -> str:
    """The mean of one value for each concept, with its interval if there is one."""
    mean, low, high = estimate(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(low) else f" ({low:.{digits}f}-{high:.{digits}f})")


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes
    out = epath.Path(OUT.value)
    names = CONCEPTS.value or sorted(folder.name for folder in shipped.EXAMPLES.iterdir() if folder.is_dir())[:MOST]
    base = load_base_model("emoji")
    evaluator = open_judges(find_judges(make_config("emoji")), "emoji", "{key}: {error}")
    rows: dict[str, list[Scores]] = {}
    distances: dict[str, list[float]] = {}
    fitted, sheet = [], []
    for name in names:
        trained = learn(base, name, out / name)
        fit, drawn = drawn_once(base, trained, out / name / "drawn.npz")
        fitted.append(fit)
        own = evaluator.embed_instances(own_pictures(name))
        plain = [prompt.replace("{}", trained.card.super_category) for prompt in PROMPTS]
        for variant, pictures in drawn.items():
            rows.setdefault(variant, []).append(score_pictures(evaluator, pictures, plain, own).mean)
            apart = np.abs(np.float32(pictures) - np.float32(drawn["gated"])).mean()
            distances.setdefault(variant, []).append(float(apart))
        sheet += [drawn[variant][::2] for variant in ("gated", "baked, 1", FITTED)]
        print(f"{name}: --fit_scale gives {fit:g}", flush=True)
    write_picture(out / "baking.png", grid(sheet))
    print("| edit | image similarity | text similarity | prompt precision | pixels from gated, of 255 |")
    print("| --- | --- | --- | --- | --- |")
    for variant, scores in rows.items():
        means = " | ".join(cell(values, 3) for values in np.transpose(scores))
        print(f"| {variant} | {means} | {cell(distances[variant], 1)} |")
    print(f"fitted strengths: {min(fitted):g} to {max(fitted):g}, mean {np.mean(fitted):.2f}")


if __name__ == "__main__":
    app.run(main)
