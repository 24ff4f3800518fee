"""A judge that knows nothing: shuffled pictures of a study, and the question which concept each shows, and where.

    python benchmarks/blind.py --study claims
    python benchmarks/blind.py --study claims --answers answers.json

The first draws 60 pictures by a fixed seed from all methods of a study (`claims.py`), shuffled, and writes
STUDY/blind/concepts.png, each concept's own pictures under its name; STUDY/blind/pictures_1.png and so on, numbered
pictures; and STUDY/blind/key.json, which the judge does not look at. The judge writes a file of answers by number,
{"1": ["rex", "in the rain"], "2": ["none", "at night"], ...}. The second tells how often each method's pictures were
taken for the right concept, and in the right place; how often the instance encoder takes them for the right concept;
and how often the judge and the encoder say the same.
"""

import json
from typing import Any

import numpy as np
from absl import app, flags
from etils import epath

from perfusion_jax import load_base_model
from perfusion_jax.base_model import network_dtype
from perfusion_jax.data.folders import read_folder
from perfusion_jax.drawing.generation import generate
from perfusion_jax.drawing.grids import grid
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.judges import Judges, open_judges
from perfusion_jax.runtime.files import read_text, write_bytes

STUDY = flags.DEFINE_string("study", "claims", "Folder that claims.py has written; it says which model and encoders.")
ANSWERS = flags.DEFINE_string("answers", None, "What the judge has written; without it pictures are drawn.")
SEED = flags.DEFINE_integer("seed", 0, "Chooses and draws the pictures.")
COUNT = flags.DEFINE_integer("count", 60, "Pictures.")

PLACES = ("in the garden", "in the rain", "at night", "in the forest", "at sunset", "in the kitchen")
"""By none of these the kept step was chosen."""
NONE = "none"
"""The answer where a picture shows none of the concepts."""
COLUMNS, ROWS = 5, 2


def concepts_of(study: epath.Path) -> dict[str, list[epath.Path]]:
    """Files of the concepts of the first seed, by the variants that the study has drawn by its full protocol."""
    labels = [folder.name.removesuffix("_0") for folder in sorted((study / "full" / "scores").glob("*_0"))]
    return {label: sorted((study / "runs" / label / "seed_0" / "concepts").glob("*.safetensors")) for label in labels}


def draw(study: epath.Path) -> None:
    """Draws the pictures, and writes them and their key."""
    files, random = concepts_of(study), np.random.default_rng(SEED.value)
    facts = json.loads(read_text(study / "study.json") or "{}")
    if "base" not in facts:
        raise app.UsageError(f"--study: {study} holds no study of claims.py")
    base = load_base_model(facts["base"], dtype=network_dtype())
    judges = Judges(*(facts[key] for key in Judges._fields))
    encoder = open_judges(judges, facts["base"], "{key}: {error}")
    folders = sorted(folder for folder in (study / "pictures_all").iterdir() if folder.is_dir())
    own = {folder.name: np.stack([picture.pixels for picture in read_folder(folder)])[:COLUMNS] for folder in folders}
    known = np.stack([encoder.embed_instances(pixels).mean(axis=0) for pixels in own.values()])

    key: list[dict[str, str]] = []
    drawn: list[np.ndarray] = []
    labels = list(files)
    for number in random.permutation(COUNT.value):
        label = labels[number % len(labels)]  # as many of each as can be
        file, place = files[label][random.integers(len(files[label]))], PLACES[random.integers(len(PLACES))]
        trained = load_concept(file, base)
        prompt, seed = f"a photo of a {trained.card.phrase} {place}", int(random.integers(2**31))
        picture = generate(base, [prompt], [seed], [trained])
        nearest = list(own)[int((known @ encoder.embed_instances(picture)[0]).argmax())]
        key.append({"method": label, "concept": file.stem, "place": place, "nearest": nearest})
        drawn.append(picture[0])

    out = study / "blind"
    write_picture(out / "concepts.png", grid(list(own.values()), list(own)))
    each = COLUMNS * ROWS
    for first in range(0, len(drawn), each):
        starts = range(first, min(first + each, len(drawn)), COLUMNS)
        rows = [np.stack(drawn[start : start + COLUMNS]) for start in starts]
        words = [f"{start + 1} to {start + len(row)}" for start, row in zip(starts, rows, strict=True)]
        write_picture(out / f"pictures_{first // each + 1}.png", grid(rows, words))
    write_bytes(out / "key.json", json.dumps(key, indent=1).encode())
    print(f"{out}: which of {', '.join(own)}, or {NONE}, is each picture of, and where: {', '.join(PLACES)}?")


def compare(key: list[dict[str, str]], answers: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """How often answers are right, by method and over all of them.

    Args:
        key: of each picture its method, concept and place, and the concept nearest to it by the instance encoder.
        answers: by the picture's number, from 1: concept and place.

    Returns:
        By method, and for `all`: shares of pictures, and how many there are.
    """
    found: dict[str, list[tuple[bool, bool, bool, bool]]] = {"all": []}
    for number, told in enumerate(key, 1):
        concept, place = answers[str(number)]
        right = (
            concept == told["concept"],
            place == told["place"],
            told["nearest"] == told["concept"],
            concept == told["nearest"],
        )
        found["all"].append(right)
        found.setdefault(told["method"], []).append(right)
    names = ("concept", "place", "encoder", "agreement")
    return {
        method: dict(zip(names, np.mean(rows, axis=0).round(2).tolist(), strict=True)) | {"pictures": len(rows)}
        for method, rows in sorted(found.items())
    }


def main(_: list[str]) -> None:
    study = epath.Path(STUDY.value)
    if ANSWERS.value is None:
        draw(study)
        return
    key, answers = (json.loads(epath.Path(file).read_text()) for file in (study / "blind" / "key.json", ANSWERS.value))
    missing = [number for number in range(1, len(key) + 1) if str(number) not in answers]
    if missing:
        raise app.UsageError(f"{ANSWERS.value}: no answer for {', '.join(map(str, missing))}")
    print("| method | pictures | right concept | right place | encoder: right concept | judge and encoder agree |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method, row in compare(key, answers).items():
        shares = " | ".join(f"{row[name]:.2f}" for name in ("concept", "place", "encoder", "agreement"))
        print(f"| {method} | {row['pictures']} | {shares} |")


if __name__ == "__main__":
    app.run(main)
