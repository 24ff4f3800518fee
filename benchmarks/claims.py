"""The paper's claims, tried one by one (Perfusion, arXiv 2305.01644), and the methods that people would pick instead.

    python benchmarks/claims.py --out claims
    python benchmarks/claims.py --out claims --base sd15 --concepts concepts.csv

Learns every concept by every variant and seed (VARIANTS, each a fleet), draws and scores all of them from the same
noise, measures what scores do not tell, and writes docs/evidence.md with its plots and sheets. What is done already is
not done again. Concepts are the unit: intervals are bootstrapped over them. Needs the `evaluate` extra.
"""

import csv
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from claims_report import write_evidence
from etils import epath
from tqdm import tqdm

from perfusion_jax import load_base_model
from perfusion_jax.base_model import BaseModel, network_dtype
from perfusion_jax.config import OVERRIDES, make_config
from perfusion_jax.data.masks import shrink
from perfusion_jax.data.pictures import Picture, fit
from perfusion_jax.data.sources import read_pictures
from perfusion_jax.data.table import Row, read_table
from perfusion_jax.drawing.generation import drawing, generate
from perfusion_jax.evaluation import measures
from perfusion_jax.evaluation.scores import PROMPTS, Drawing, Setting, read_scores, score_all
from perfusion_jax.evaluation.subjects import Subject
from perfusion_jax.formats.concept_file import TrainedConcept, load_concept, save_concept
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.judges import find_judges, open_judges
from perfusion_jax.learning.metrics import Evaluator, score_pictures
from perfusion_jax.learning.runs import train_fleet
from perfusion_jax.learning.workdir import make_card
from perfusion_jax.method.baselines import Word
from perfusion_jax.method.concept import Concept
from perfusion_jax.runtime.files import read_text, write_bytes

OUT = flags.DEFINE_string("out", "claims", "Folder of all that is learnt, drawn and measured.")
DOCS = flags.DEFINE_string("docs", "docs", "Folder that evidence.md is written to.")
BASE = flags.DEFINE_string("base", "emoji", "The model.")
CONCEPTS = flags.DEFINE_string("concepts", "emoji", "Table of at least eight concepts that no setting was chosen by.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Times that each variant is learnt.", lower_bound=1)
CONFIG = flags.DEFINE_multi_string("config", [], "KEY=VALUE of all runs' configs, the value in JSON.")
ONLY = flags.DEFINE_list("only", [], "Variants to learn and draw now; the report comes when all are there.")

BIASES = (0.3, 0.45, 0.6, 0.7, 0.8)
FEW_BIASES = (0.45, 0.6, 0.75)
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)
TEMPERATURES = (0.05, 0.1, 0.15, 0.2, 0.3)
GLOBAL_BIASES = (0.3, 0.4, 0.5, 0.6)
PLAIN = "plain"
"""What the super-category's own word draws: the label of concepts that have learnt nothing."""


def swept(control: str, values: tuple[float, ...], **others: Any) -> list[Setting]:
    return [Setting(f"{control} {value:g}", {control: value, **others}) for value in values]


class Variant(NamedTuple):
    """A way to learn.

    Attributes:
        changes: of the config.
        full: settings that it is drawn under by the whole protocol, twenty prompts and four seeds.
        few: likewise by ten prompts and two seeds.
        pictures: that each concept is learnt from; 0 for all.
    """

    changes: dict[str, Any]
    full: list[Setting]
    few: list[Setting]
    pictures: int = 0


GLOBAL = [each._replace(label=f"global {each.label}") for each in swept("bias", GLOBAL_BIASES, lock="global")]
FEW = swept("bias", FEW_BIASES)
BY_STRENGTH = swept("strength", STRENGTHS)
VARIANTS = {
    "perfusion": Variant(
        {},
        swept("bias", BIASES) + GLOBAL,
        FEW + swept("temperature", TEMPERATURES),
    ),
    "trained-keys": Variant({"lock_keys": False}, swept("bias", BIASES), []),
    "textual-inversion": Variant({"method": "textual_inversion"}, [Setting("defaults", {})], []),
    "lora-1": Variant({"method": "lora"}, BY_STRENGTH, []),
    "lora-4": Variant({"method": "lora", "rank": 4}, BY_STRENGTH, []),
    "custom-diffusion": Variant({"method": "custom_diffusion"}, BY_STRENGTH, []),
    "dreambooth": Variant({"method": "dreambooth"}, BY_STRENGTH, []),
    "mask-found": Variant({"masks": "attention"}, [], FEW),
    "mask-none": Variant({"masks": "none"}, [], FEW),
    **{f"beta-{int(100 * beta)}": Variant({"bias": beta}, [], FEW) for beta in (0.55, 0.65, 0.85)},
    "pictures-1": Variant({}, [], FEW, pictures=1),
    "pictures-2": Variant({}, [], FEW, pictures=2),
    **{f"decay-{d:g}": Variant({"target_input_decay": d}, [], FEW) for d in (0.0, 0.9, 0.999)},
    "straight-through": Variant({"straight_through": True}, [], FEW),
}
VARIANTS = {label.replace(".", "_"): variant for label, variant in VARIANTS.items()}
METHODS = [label for label, variant in VARIANTS.items() if variant.full]

PAIRS = ("a photo of a {} and a {} on the beach", "a {} next to a {} in the snow")
TRIPLES = ("a photo of a {}, a {} and a {} on the beach", "a {}, a {} and a {} in the city")


class Study(NamedTuple):
    """What all steps share.

    Attributes:
        out: the folder.
        base, evaluator: the model and its judges.
        rows: the concepts.
        own: each one's pictures, by name.
    """

    out: epath.Path
    base: BaseModel
    evaluator: Evaluator
    rows: list[Row]
    own: dict[str, list[Picture]]

    def pixels(self, name: str) -> np.ndarray:
        """A concept's own pictures, uint8 [count, side, side, 3]."""
        return np.stack([picture.pixels for picture in self.own[name]])

    def file(self, variant: str, seed: int, name: str) -> epath.Path:
        """Of a concept."""
        return self.out / "runs" / variant / f"seed_{seed}" / "concepts" / f"{name}.safetensors"

    def concept(self, name: str, variant: str = "perfusion", seed: int = 0) -> TrainedConcept:
        """A concept, as it was learnt."""
        return load_concept(self.file(variant, seed, name), self.base)

    def embedded(self) -> dict[str, np.ndarray]:
        """All concepts' own pictures as the instance encoder sees them."""
        return {row.name: self.evaluator.embed_instances(self.pixels(row.name)) for row in self.rows}


def write_table(study: Study, count: int) -> epath.Path:
    """Writes a table of the concepts with some of their pictures, as files."""
    folder = study.out / f"pictures_{count or 'all'}"
    table = folder / "concepts.csv"
    if table.exists():
        return table
    lines = []
    for row in study.rows:
        for number, picture in enumerate(study.own[row.name][: count or None]):
            write_picture(folder / row.name / f"{number}.png", picture.pixels)
            if picture.mask is not None:
                mask = np.round(255 * picture.mask).astype(np.uint8)
                write_picture(folder / row.name / "masks" / f"{number}.png", np.repeat(mask[..., None], 3, axis=2))
            if picture.caption:
                write_bytes(folder / row.name / f"{number}.txt", picture.caption.encode())
        lines.append([row.name, row.super_category, row.name])
    with table.open("w") as file:
        csv.writer(file).writerows([["name", "super_category", "pictures"], *lines])
    return table


def given_config() -> dict[str, Any]:
    """Values of keys from the command line."""
    pairs = (text.split("=", 1) for text in CONFIG.value)
    found = {key: json.loads(value) for key, value in pairs}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def learn(study: Study, label: str, seed: int) -> None:
    """Learns all concepts by a variant."""
    variant = VARIANTS[label]
    changes = given_config() | variant.changes
    config = make_config(BASE.value, concepts=str(write_table(study, variant.pictures)), seed=seed, **changes)
    train_fleet(config, study.out / "runs" / label / f"seed_{seed}")


def save_plain(study: Study) -> None:
    """Writes concepts that have learnt nothing: words that are their super-category's."""
    for row in study.rows:
        file = study.file(PLAIN, 0, row.name)
        if not file.exists():
            word = Word(study.base.super_category_embedding(row.super_category))
            config = make_config(BASE.value, name=row.name, super_category=row.super_category)
            config.method = "textual_inversion"
            save_concept(file, word, make_card(config, study.base, step=0))


def score(study: Study, full: bool, labels: list[str]) -> list[dict[str, Any]]:
    """Draws and scores variants by one of the protocols; returns the lines of all that is there."""
    settings = {label: v.full if full else v.few for label, v in VARIANTS.items() if label in labels}
    settings = {label: own for label, own in settings.items() if own} | {PLAIN: [Setting("defaults", {})]}
    subjects = [
        Subject(row.name, file, str(study.out / "pictures_all" / row.name), label=label, run=f"{label}_{seed}")
        for label in settings
        for seed in range(SEEDS.value)
        for row in study.rows
        if (file := study.file(label, seed, row.name)).exists()
    ]
    plan = Drawing(PROMPTS if full else PROMPTS[:10], range(4 if full else 2), {"batch_size": 16})
    out = study.out / ("full" if full else "few")
    work = score_all(study.base, study.evaluator, None, subjects, settings, plan, out)
    total = sum(len(settings[subject.label]) for subject in subjects)
    for _ in tqdm(work, f"{out.name} protocol", total, unit="sheet"):
        pass
    wanted = {(label, setting.label) for label, own in settings.items() for setting in own}
    lines = [line for subject in subjects for line in read_scores(out, subject)]
    return [line for line in lines if (line["label"], line["setting"]) in wanted]


def size(study: Study) -> dict[str, Any]:
    """C1: bytes of a concept and of the model's weights as they are published, in float32."""
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(study.base.params))
    files = {label: study.file(label, 0, study.rows[0].name).stat().length for label in METHODS}
    return {"model": weights, "files": files}


def seconds(study: Study) -> dict[str, Any]:
    """C2: how long a fleet of all concepts learns, and the steps that were kept."""
    found = {}
    for label in METHODS:
        folder = study.out / "runs" / label / "seed_0"
        lines = [json.loads(line) for line in read_text(folder / "report.jsonl").splitlines()]
        kept = [study.concept(row.name, label).card.step for row in study.rows]
        found[label] = {"fleet": max(line.get("seconds", 0) for line in lines), "kept": kept}
    return found


def likeness(study: Study) -> dict[str, Any]:
    """The image similarity of concepts' own pictures to each other: what no method is to exceed."""
    return {"own": [measures.likeness(own) for own in study.embedded().values()]}


def variety(study: Study) -> dict[str, Any]:
    """C10: how different pictures of one prompt are, under each lock, by concept."""
    prompts, seeds = PROMPTS[:6], 6
    found: dict[str, list[float]] = {"local": [], "global": []}
    for row in study.rows:
        trained = study.concept(row.name)
        asked = [prompt.replace("{}", trained.card.phrase) for prompt in prompts for _ in range(seeds)]
        for lock, values in found.items():
            bias = 0.5 if lock == "global" else 0.6
            drawn = generate(study.base, asked, list(range(seeds)) * len(prompts), [trained], lock=lock, bias=bias)
            embedded = study.evaluator.clip.images(drawn)
            values.append(measures.variety(embedded.reshape(len(prompts), seeds, -1)))
    return found


def together(study: Study) -> dict[str, Any]:
    """C11: how often each of two and of three concepts is in a picture, and all of them; and without them learnt."""
    known, names = study.embedded(), [row.name for row in study.rows]
    found: dict[str, dict[str, list[float]]] = {}
    for count, templates in ((2, PAIRS), (3, TRIPLES)):
        shares = found.setdefault(str(count), {"each": [], "all": [], "plain": []})
        for first in range(len(names)):
            group = [names[(first + other) % len(names)] for other in range(count)]
            for kind in ("each", "plain"):
                learnt = [study.concept(name, "perfusion" if kind == "each" else PLAIN) for name in group]
                phrases = [card.phrase for _, card in learnt]
                asked = [template.format(*phrases) for template in templates for _ in range(4)]
                drawn = generate(study.base, asked, [*range(4)] * len(templates), learnt)
                there = measures.presence(study.evaluator.embed_instances, drawn, known)
                each = np.stack([there[name] for name in group])
                shares[kind].append(float(each.mean()))
                if kind == "each":
                    shares["all"].append(float(each.all(axis=0).mean()))
    return found


def looked_at(study: Study) -> dict[str, Any]:
    """C12: the share of the word's attention inside the thing, on noisy copies of its own pictures, by method."""
    found: dict[str, list[float]] = {}
    for label in [*METHODS, PLAIN]:
        for row in study.rows:
            trained = study.concept(row.name, label)
            placeholder = trained.card.placeholder
            prompt = f"a photo of a {trained.card.phrase}"
            pieces = study.base.model.tokenizer.pieces(prompt, [placeholder])
            place = next(position for position, piece in pieces if piece == placeholder)
            shares = []
            for picture in study.own[row.name]:
                if picture.mask is None:
                    continue
                seen = drawing(
                    study.base,
                    [prompt],
                    [0],
                    [trained],
                    init_image=picture.pixels,
                    init_strength=0.5,
                    steps=20,
                    attention=True,
                    batch_size=1,
                )
                maps = next(seen).attention
                assert maps is not None
                mask = shrink(picture.mask[None], study.base.model.vae_factor)
                shares.append(measures.share_inside(maps[..., place], mask)[0] / mask.mean())
            if shares:
                found.setdefault(label, []).append(float(np.mean(shares)))
    return found


def of_eight(study: Study) -> dict[str, Any]:
    """C13: of eight pictures of a prompt, how many are good, by concept and prompt."""
    prompts, seeds = PROMPTS[:6], 8
    found: dict[str, list[list[int]]] = {}
    for row in study.rows:
        own = study.evaluator.embed_instances(study.pixels(row.name))
        texts = [prompt.replace("{}", row.super_category) for prompt in prompts for _ in range(seeds)]
        scores = {}
        for label in ("perfusion", PLAIN):
            trained = study.concept(row.name, label)
            asked = [prompt.replace("{}", trained.card.phrase) for prompt in prompts for _ in range(seeds)]
            drawn = generate(study.base, asked, list(range(seeds)) * len(prompts), [trained])
            scores[label] = score_pictures(study.evaluator, drawn, texts, own)
        least_text = np.repeat(0.9 * scores[PLAIN].text.reshape(len(prompts), seeds).mean(axis=1), seeds)
        least_image = measures.LIKENESS * measures.likeness(own)
        good = (scores["perfusion"].image >= least_image) & (scores["perfusion"].text >= least_text)
        found[row.name] = good.reshape(len(prompts), seeds).sum(axis=1).tolist()
    return found


def gates(study: Study) -> dict[str, Any]:
    """C14: how far gates open, by the place of a token from the concept's word."""
    found: dict[str, list[float]] = {}
    for row in study.rows:
        concept, card = study.concept(row.name)
        assert isinstance(concept, Concept)
        for place, values in measures.gates_by_position(study.base, concept, card, PROMPTS).items():
            found.setdefault(str(place), []).append(float(values.mean()))
    return found


def diverged(study: Study) -> dict[str, Any]:
    """C15: how many concepts of each variant diverged, over its seeds."""
    found = {}
    for label in VARIANTS:
        files = (study.out / "runs" / label / f"seed_{seed}" / "report.jsonl" for seed in range(SEEDS.value))
        lines = [json.loads(line) for file in files for line in read_text(file).splitlines()]
        found[label] = sum(line["state"] == "diverged" for line in lines)
    return found


MEASURES: dict[str, Callable[[Study], dict[str, Any]]] = {
    "size": size,
    "seconds": seconds,
    "likeness": likeness,
    "variety": variety,
    "together": together,
    "looked_at": looked_at,
    "of_eight": of_eight,
    "gates": gates,
    "diverged": diverged,
}


def measured(study: Study) -> dict[str, Any]:
    """All measures, each kept in a file."""
    found = {}
    for name, measure in tqdm(MEASURES.items(), "measuring"):
        file = study.out / "measures" / f"{name}.json"
        if not file.exists():
            write_bytes(file, json.dumps(measure(study), indent=1).encode())
        found[name] = json.loads(file.read_text())
    return found


def draw_sheet(study: Study) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Some concepts by each method in one place: rows of pictures, and the words beside rows and columns."""
    shown = study.rows[:6]
    prompt, rows = PROMPTS[1], [np.stack([study.pixels(row.name)[0] for row in shown])]
    for label in [PLAIN, *METHODS]:
        pictures = []
        for row in shown:
            trained = study.concept(row.name, label)
            pictures.append(generate(study.base, [prompt.replace("{}", trained.card.phrase)], [0], [trained])[0])
        rows.append(np.stack(pictures))
    return rows, ["its own", PLAIN, *METHODS], [row.name for row in shown]


def open_study() -> Study:
    out = epath.Path(OUT.value)
    rows = [row for row in read_table(CONCEPTS.value, OVERRIDES) if not row.problem]
    base = load_base_model(BASE.value, dtype=network_dtype())
    judges = find_judges(make_config(BASE.value, **given_config()))
    evaluator = open_judges(judges, BASE.value, "--config={key}: {error}")
    side = base.model.picture_side
    own = {row.name: [fit(p, side, True) for p in read_pictures(row.pictures, row.masks, row.captions)] for row in rows}
    return Study(out, base, evaluator, rows, own)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes
    study = open_study()
    labels = ONLY.value or list(VARIANTS)
    unknown = [label for label in labels if label not in VARIANTS]
    if unknown or not all(re.fullmatch("[a-z0-9_-]+", label) for label in VARIANTS):
        raise app.UsageError(f"--only: no variant {unknown}; there are {', '.join(VARIANTS)}")
    write_table(study, 0)
    save_plain(study)
    for seed in range(SEEDS.value):
        for label in labels:
            print(f"learning: {label}, seed {seed}", flush=True)
            learn(study, label, seed)
    lines = {full: score(study, full, labels) for full in (True, False)}
    if not ONLY.value:
        docs = epath.Path(DOCS.value)
        write_evidence(docs, lines[True], lines[False], measured(study), draw_sheet(study), BASE.value, SEEDS.value)
        print(docs / "evidence.md")


if __name__ == "__main__":
    app.run(main)
