"""One concept, a whole front: image and text similarity as the bias of the gate is turned (paper, figure 5).

    python benchmarks/front.py --concept runs/dog/concepts/dog.safetensors --out front

Draws the concept in places that its pictures do not show, at each bias, on the embedded model; prints the similarities
by the embedded evaluator and draws them to OUT/front.png. `--concept` may be given several times. Needs matplotlib.
"""

from pathlib import Path

import matplotlib
import numpy as np
from absl import app, flags
from unseen import draw_and_score

from perfusion_jax import load_base_model
from perfusion_jax.base_model.clip import load_clip
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.runtime import shipped

matplotlib.use("agg")
from matplotlib import pyplot as plt

OUT = flags.DEFINE_string("out", "front", "Folder of the plot.")
CONCEPT = flags.DEFINE_multi_string("concept", None, "Concept files of example concepts.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 4, "Pictures in each place.")

# Above 1 the gate is shut even at the concept's own word; far below, it is open at all words.
BIASES = np.linspace(0.4, 1, 7).round(2)


def main(_: list[str]) -> None:
    base, clip = load_base_model("emoji"), load_clip(shipped.EVALUATOR)
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for file in CONCEPT.value:
        trained = load_concept(file, base)
        name = trained.card.name
        print(f"| {name}: bias | image similarity | text similarity | prompt precision |")
        print("| --- | --- | --- | --- |")
        scores = []
        for bias in BIASES:
            scores.append(draw_and_score(base, clip, trained, SEEDS.value, bias=float(bias), batch_size=16)[-1])
            print(f"| {bias:g} | {' | '.join(f'{value:.3f}' for value in scores[-1])} |", flush=True)
        image, text, _ = np.array(scores).T
        print(f"correlation of image and text similarity over the sweep: {np.corrcoef(image, text)[0, 1]:.2f}")
        axes.plot(text, image, "o-", label=name)
        for bias, x, y in zip(BIASES, text, image, strict=True):
            axes.annotate(f"{bias:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="text similarity", ylabel="image similarity", title="bias of the gate")
    axes.legend()
    Path(OUT.value).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(OUT.value) / "front.png", dpi=120)


if __name__ == "__main__":
    app.run(main)
