"""Personal things that nobody trained on: learnt from five pictures each, drawn elsewhere, and judged one by one.

    python benchmarks/personal.py --out personal
    python benchmarks/personal.py --out personal_new --base=FOLDER/model --guidance=7 \\
        --train=--config.values_rate=0.03 --train=--config.embedding_rate=0.006

Takes things of held-out vendors, draws five pictures of each at free places and sizes (`pretraining/personal.py`),
learns them together as a fleet, draws each in four places that its pictures do not show with four seeds, and asks the
judges: among eight individuals of its kind, is its own the nearest? Is it of its kind? Is it in the place asked for?
How alike are they to its own pictures, cut out by their masks? The same is asked of rendered pictures of the thing in
the same places: the ceiling. Intervals are over things. A thing that was not learnt counts as wrong in all pictures.

The judges are those beside the base, BASE/../clip and BASE/../instance; without an instance encoder there, nothing is
asked of individuals. A base of another shape wants rates of its own for learning: give them by --train.

Writes OUT/scores.jsonl, a line as soon as a thing is judged, and OUT/table.md and OUT/sheet.png: the thing's first
pictures, and what was drawn. What is there is not made again; other flags want another --out. Needs the `benchmarks`
extra and npm.
"""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import app, flags
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from personal_report import SHARES, SIMILARITY, keep_options, not_learnt, read_lines, table_of

from perfusion_jax import load_base_model
from perfusion_jax.base_model import BaseModel
from perfusion_jax.base_model.clip import Clip, load_clip
from perfusion_jax.base_model.instance import InstanceEncoder, load_instance_encoder
from perfusion_jax.drawing.generation import generate
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.runtime import shipped
from pretraining import captions, held_out, personal, places, scenes, things

OUT = flags.DEFINE_string("out", "personal", "Folder of all that is written.")
THINGS = flags.DEFINE_integer("things", 24, "How many things.")
SEED = flags.DEFINE_integer("seed", 0, "Chooses the things and draws their pictures.")
MASKS = flags.DEFINE_bool("masks", True, "Give the masks to training.")
BASE = flags.DEFINE_string("base", "emoji", "The model.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale of the pictures; the base's own if left out.")
EVALUATOR = flags.DEFINE_string("evaluator", "", "Folder of the CLIP that is asked; BASE/../clip if left out.")
INSTANCE = flags.DEFINE_string("instance_encoder", "", "Folder of the encoder; BASE/../instance if left out.")
TRAIN = flags.DEFINE_multi_string("train", [], "More flags for training, such as --config.steps=200.")

PICTURES, PLACES, SEEDS, INDIVIDUALS = 5, 4, 4, 8
CORNER = 128
"""Side of a picture in the sheet: twice that of a drawn one."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A thing, the pictures of it that are learnt, the seed that drew them, and the places in which it is drawn."""

    thing: personal.Thing
    seed: int
    sprite: torch.Tensor
    pictures: np.ndarray
    masks: np.ndarray
    where: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Judges:
    """Who is asked; of individuals nobody, if there is no instance encoder."""

    clip: Clip
    instance: InstanceEncoder | None


def make_case(thing: personal.Thing, seed: int) -> Case:
    """Its pictures, by a seed of its own, and SEEDS times each of PLACES others."""
    sprite = held_out.sprite(thing.vendor, thing.drawing, personal.SIDE * 3 // 4)
    assert sprite is not None
    tensor = torch.from_numpy(sprite)
    pictures, masks, shown = personal.photographs(tensor, PICTURES, seed)
    others = [place for place in places.PLACES if place not in shown]
    elsewhere = np.random.default_rng(seed).permutation(others)[:PLACES]
    return Case(thing, seed, tensor, pictures, masks, tuple(str(place) for place in elsewhere for _ in range(SEEDS)))


def find_judges() -> tuple[str, str]:
    """Folders of the CLIP and of the instance encoder; "" for no encoder.

    Raises:
        UsageError: there is no CLIP.
    """
    model = shipped.MODEL if BASE.value == "emoji" else Path(BASE.value)
    clip, instance = (
        given or personal.judge_beside(model, name)
        for given, name in ((EVALUATOR.value, "clip"), (INSTANCE.value, "instance"))
    )
    if not clip:
        raise app.UsageError(f"{model.absolute().parent / 'clip'}: no CLIP beside the base; name one by --evaluator")
    return clip, instance


def learn(cases: list[Case], folder: Path) -> None:
    """Learns all things as a fleet, what is learnt already left out."""
    with (folder / "concepts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", "super_category", "pictures"])
        for case in cases:
            personal.write_pictures(folder / "things" / case.thing.name, case.pictures, case.masks)
            table.writerow([case.thing.name, case.thing.kind, f"things/{case.thing.name}"])
    config = Path(__file__).parents[1] / "configs" / "fleet.py"
    command = [sys.executable, "-m", "perfusion_jax.train", f"--config={config}:{BASE.value}"]
    command += [f"--config.concepts={folder / 'concepts.csv'}", f"--workdir={folder / 'run'}", *TRAIN.value]
    command += [] if MASKS.value else ["--config.masks=attention"]
    subprocess.run(command, check=True)


def small(pictures: np.ndarray, side: int = scenes.PIXELS) -> np.ndarray:
    """Pictures uint8 [count, any, any, 3] at [count, side, side, 3]."""
    return np.stack([np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BOX)) for each in pictures])


def of_kind_and_place(clip: Clip, pictures: np.ndarray, kind: str, where: tuple[str, ...]) -> tuple[float, float]:
    """Shares of pictures that show the kind, among all kinds, and the place, among all places."""
    kinds = clip.texts([f"a photo of {captions.article(each)} {each}" for each in things.kinds()])
    at = clip.texts([f"a photo of {captions.article(kind)} {kind} {phrase}" for phrase in places.PHRASES.values()])
    embedded = clip.images(pictures)
    found = np.array(things.kinds())[(embedded @ kinds.T).argmax(1)]
    right = np.array(places.PLACES)[(embedded @ at.T).argmax(1)] == np.array(where)
    return float((found == kind).mean()), float(right.mean())


def judge(case: Case, drawn: np.ndarray | None, judges: Judges) -> dict[str, Any]:
    """Shares of right answers and the image similarity, of what was drawn and of rendered pictures in the same places.

    Args:
        case: the thing.
        drawn: uint8 [count, side, side, 3], a picture for each of the case's places; None if it was not learnt.
        judges: who is asked.
    """
    rendered = small(personal.photographs(case.sprite, len(case.where), 77_000 + case.seed, where=case.where)[0])
    line = {
        "name": case.thing.name,
        "kind": case.thing.kind,
        "vendor": case.thing.vendor,
        "core": case.thing.core,
    }
    answers: dict[str, dict[str, float]] = {}
    if judges.instance is not None:
        individuals = personal.individuals_like(case.thing, INDIVIDUALS, PICTURES, case.seed)
        references = np.stack([judges.instance.images(small(each)) for each in individuals])
        cut_out = personal.cut_out(case.pictures, case.masks)
        own = judges.instance.images(small(cut_out))
    for key, pictures in (("rendered", rendered), ("drawn", drawn)):
        if pictures is None:
            continue
        kind, place = of_kind_and_place(judges.clip, pictures, case.thing.kind, case.where)
        answers[key] = dict(zip(SHARES[1:], (kind, place), strict=True))
        if judges.instance is not None:
            embedded = judges.instance.images(pictures)
            nearest = np.einsum("pw,irw->pi", embedded, references).argmax(1)
            answers[key] |= {SHARES[0]: float((nearest == 0).mean()), SIMILARITY: float((embedded @ own.T).mean())}
    return not_learnt(line | answers) if drawn is None else line | answers


def draw(case: Case, concept: Path, base: BaseModel) -> np.ndarray:
    """The learnt thing in all its places: uint8 [places, side, side, 3]."""
    prompts = [f"a photo of a <{case.thing.name}> {places.PHRASES[place]}" for place in case.where]
    options = {"guidance": GUIDANCE.value, "batch_size": len(prompts)}
    return generate(base, prompts, range(len(prompts)), [load_concept(concept, base)], **options)


def main(_: list[str]) -> None:
    folder = Path(OUT.value).absolute()
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    clip, instance = find_judges()
    options = {flag.name: flag.value for flag in (THINGS, SEED, MASKS, BASE, GUIDANCE, TRAIN)}
    options |= {"evaluator": clip, "instance_encoder": instance}
    try:
        keep_options(folder / "options.json", options)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    chosen = personal.choose(THINGS.value, SEED.value)
    cases = [make_case(thing, 1_000 * SEED.value + number) for number, thing in enumerate(chosen)]
    scores = folder / "scores.jsonl"
    lines = read_lines(scores)
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))  # without what a kill cut
    missing = [case for case in cases if case.thing.name not in lines]
    if missing:
        learn(cases, folder)
        base = load_base_model(BASE.value)
        judges = Judges(load_clip(clip), load_instance_encoder(instance) if instance else None)
    for case in missing:
        name = case.thing.name
        concept = folder / "run" / "concepts" / f"{name}.safetensors"
        drawn = draw(case, concept, base) if concept.exists() else None
        shown = small(case.pictures[:2], CORNER)
        row = shown if drawn is None else np.concatenate([shown, small(drawn[:: SEEDS // 2], CORNER)])
        Image.fromarray(np.concatenate(list(row), 1)).save(folder / "rows" / f"{name}.png")
        lines[name] = judge(case, drawn, judges)
        told = json.dumps(lines[name])
        print(told, flush=True)
        if drawn is not None:  # else training tries it again when the command is given again
            with scores.open("a") as file:
                file.write(told + "\n")
    rows = [Image.open(folder / "rows" / f"{case.thing.name}.png") for case in cases]
    sheet = Image.new("RGB", (max(row.width for row in rows), CORNER * len(rows)), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, CORNER * number))
    sheet.save(folder / "sheet.png")
    table = table_of([lines[case.thing.name] for case in cases], options)
    (folder / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    app.run(main)
