"""Personal things that nobody trained on: learnt from five pictures each, drawn elsewhere, and judged one by one.

    python benchmarks/personal.py --out personal

Takes things of held-out vendors, draws five pictures of each at free places and sizes (`pretraining/personal.py`),
learns them together as a fleet, draws each in four places that its pictures do not show with four seeds, and asks the
judges: among eight individuals of its kind, is its own the nearest? Is it of its kind? Is it in the place asked for?
The same questions are put to rendered pictures of the thing in the same places: the ceiling. Intervals are bootstrapped
over things. Writes OUT/table.md, OUT/scores.jsonl and OUT/sheet.png: the thing's first pictures, and what was drawn.
What is done already is not done again. Needs the `benchmarks` extra and npm.
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

from perfusion_jax import load_base_model
from perfusion_jax.base_model.clip import Clip, load_clip
from perfusion_jax.base_model.instance import InstanceEncoder, load_instance_encoder
from perfusion_jax.drawing.generation import generate
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.runtime import shipped
from pretraining import captions, held_out, personal, places, things

OUT = flags.DEFINE_string("out", "personal", "Folder of all that is written.")
THINGS = flags.DEFINE_integer("things", 24, "How many things.")
SEED = flags.DEFINE_integer("seed", 0, "Chooses the things and draws their pictures.")
MASKS = flags.DEFINE_bool("masks", True, "Give the masks to training.")
BASE = flags.DEFINE_string("base", "emoji", "The model.")
EVALUATOR = flags.DEFINE_string("evaluator", str(shipped.EVALUATOR), "Folder of the CLIP that is asked.")
INSTANCE = flags.DEFINE_string("instance_encoder", "", "Folder of the encoder that is asked; empty: only the sheet.")
TRAIN = flags.DEFINE_multi_string("train", [], "More flags for training, such as --config.steps=200.")

PICTURES, PLACES, SEEDS, INDIVIDUALS = 5, 4, 4, 8
QUESTIONS = ("individual", "category", "place")
CORNER = 96
"""Side of a picture in the sheet."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A thing, the pictures of it that are learnt, and the places in which it is drawn."""

    thing: personal.Thing
    sprite: torch.Tensor
    pictures: np.ndarray
    masks: np.ndarray
    elsewhere: tuple[str, ...]


def make_case(thing: personal.Thing, seed: int) -> Case:
    """Its pictures, by a seed of its own."""
    sprite = held_out.sprite(thing.vendor, thing.drawing, personal.SIDE * 3 // 4)
    assert sprite is not None
    tensor = torch.from_numpy(sprite)
    pictures, masks, shown = personal.photographs(tensor, PICTURES, seed)
    others = [place for place in places.PLACES if place not in shown]
    elsewhere = np.random.default_rng(seed).permutation(others)[:PLACES]
    return Case(thing, tensor, pictures, masks, tuple(map(str, elsewhere)))


def learn(cases: list[Case], folder: Path) -> Path:
    """Learns all things as a fleet; returns the folder of their concepts."""
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
    return folder / "run" / "concepts"


def small(pictures: np.ndarray, side: int) -> np.ndarray:
    """Pictures uint8 [count, any, any, 3] at [count, side, side, 3]."""
    return np.stack([np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BOX)) for each in pictures])


def share_of_own(instance: InstanceEncoder, case: Case, pictures: np.ndarray, seed: int, side: int) -> np.ndarray:
    """Which pictures are nearest to the thing's own, not to those of seven rivals of its kind: bool [count]."""
    rivals = held_out.individuals_of(case.thing.kind, INDIVIDUALS, seed, (case.thing.vendor, case.thing.drawing))[1:]
    known = [case.pictures] + [
        personal.photographs(rival, PICTURES, seed * 100 + number)[0] for number, rival in enumerate(rivals)
    ]
    references = np.stack([instance.images(small(each, side)) for each in known])
    nearness = np.einsum("pw,irw->pi", instance.images(pictures), references)
    return nearness.argmax(1) == 0


def of_kind_and_place(clip: Clip, pictures: np.ndarray, kind: str, where: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Which pictures show the kind, among all kinds, and the place, among all places: two bool [count]."""
    kinds = clip.texts([f"a photo of {captions.article(each)} {each}" for each in things.kinds()])
    at = clip.texts([f"a photo of {captions.article(kind)} {kind} {phrase}" for phrase in places.PHRASES.values()])
    embedded = clip.images(pictures)
    found = np.array(things.kinds())[(embedded @ kinds.T).argmax(1)]
    return found == kind, np.array(places.PLACES)[(embedded @ at.T).argmax(1)] == np.array(where)


def judge(
    case: Case, drawn: np.ndarray, where: list[str], number: int, clip: Clip, instance: InstanceEncoder
) -> dict[str, Any]:
    """The share of right answers to each question, for what was drawn and for rendered pictures in the same places."""
    side = drawn.shape[1]
    rendered = small(personal.photographs(case.sprite, len(where), 77_000 + number, where=where)[0], side)
    line: dict[str, Any] = {"name": case.thing.name, "kind": case.thing.kind, "vendor": case.thing.vendor}
    for key, pictures in (("drawn", drawn), ("rendered", rendered)):
        kind, place = of_kind_and_place(clip, pictures, case.thing.kind, where)
        own = share_of_own(instance, case, pictures, 1_000 * SEED.value + number, side)
        line[key] = {name: float(right.mean()) for name, right in zip(QUESTIONS, (own, kind, place), strict=True)}
    return line


def interval(values: np.ndarray, repeats: int = 4_000) -> str:
    """Mean of one value a thing, in percent, with its 95 % bootstrap interval."""
    random = np.random.default_rng(0)
    means = values[random.integers(len(values), size=(repeats, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{100 * values.mean():.0f} ({100 * low:.0f}-{100 * high:.0f})"


def table_of(lines: list[dict[str, Any]]) -> str:
    """The table by vendor, for all, and the ceiling."""
    rows = [
        f"| | things | {' | '.join(f'{question}, %' for question in QUESTIONS)} |",
        f"| {' | '.join(['---'] * (2 + len(QUESTIONS)))} |",
    ]
    groups = {
        vendor: [line for line in lines if line["vendor"] == vendor] for vendor in {line["vendor"] for line in lines}
    }
    for name, group, key in (
        *((vendor, group, "drawn") for vendor, group in sorted(groups.items())),
        ("all", lines, "drawn"),
        ("ceiling: rendered pictures", lines, "rendered"),
    ):
        cells = [interval(np.array([line[key][question] for line in group])) for question in QUESTIONS]
        rows.append(f"| {name} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main(_: list[str]) -> None:
    folder = Path(OUT.value).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = personal.choose(THINGS.value, SEED.value)
    cases = [make_case(thing, 1_000 * SEED.value + number) for number, thing in enumerate(chosen)]
    concepts = learn(cases, folder)
    base, lines, rows = load_base_model(BASE.value), [], []
    judges = (load_clip(EVALUATOR.value), load_instance_encoder(INSTANCE.value)) if INSTANCE.value else None
    for number, case in enumerate(cases):
        file = concepts / f"{case.thing.name}.safetensors"
        where = [place for place in case.elsewhere for _ in range(SEEDS)]
        prompts = [f"a photo of a <{case.thing.name}> {places.PHRASES[place]}" for place in where]
        drawn = generate(base, prompts, range(len(prompts)), [load_concept(file, base)], batch_size=PLACES * SEEDS)
        shown = np.concatenate([small(case.pictures[:2], CORNER), small(drawn[:: SEEDS // 2], CORNER)])
        rows.append(np.concatenate(list(shown), 1))
        if judges is not None:
            lines.append(judge(case, drawn, where, number, *judges))
            print(json.dumps(lines[-1]), flush=True)
    Image.fromarray(np.concatenate(rows)).save(folder / "sheet.png")
    if judges is not None:
        (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "table.md").write_text(table_of(lines))
        print(table_of(lines))


if __name__ == "__main__":
    app.run(main)
