"""The paper's claims, tried one by one (Perfusion, arXiv 2305.01644), and the methods that people would pick instead.

    python benchmarks/claims.py --concepts concepts.csv --tuning others.csv --out claims
    python benchmarks/claims.py --concepts concepts.csv --tuning others.csv --out claims --base sd15

First each method's learning rates are chosen on the concepts of --tuning, by the score that chooses the kept step. Then
every concept is learnt by every variant and seed (VARIANTS, each a fleet). All are drawn and scored from the same
noise, by prompts and seeds by which nothing was chosen. It measures what scores do not tell, and writes
docs/evidence.md with its plots and sheets. What is done already is not done again. Concepts are the unit: intervals are
bootstrapped over them. Needs the `evaluate` extra.
"""

import csv
import hashlib
import json
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import measures
import numpy as np
from absl import app, flags, logging
from claims_report import LEAST, Made, Tuned, write_evidence
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from perfusion_jax import load_base_model
from perfusion_jax.base_model import BaseModel, network_dtype
from perfusion_jax.config import KEYS, OVERRIDES, make_config
from perfusion_jax.data.masks import shrink
from perfusion_jax.data.pictures import Picture, fit
from perfusion_jax.data.sources import read_pictures
from perfusion_jax.data.table import Row, read_table
from perfusion_jax.drawing.generation import drawing, generate
from perfusion_jax.evaluation.report import check_plots
from perfusion_jax.evaluation.scores import PROMPTS, Drawing, Setting, over_devices, read_scores, score_all
from perfusion_jax.evaluation.subjects import Subject
from perfusion_jax.formats.concept_file import TrainedConcept, load_concept, save_concept
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.judges import find_judges, open_judges
from perfusion_jax.learning.metrics import Evaluator, score_pictures
from perfusion_jax.learning.runs import train_fleet
from perfusion_jax.learning.workdir import make_card
from perfusion_jax.method.baselines import Baseline
from perfusion_jax.method.concept import Concept
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import read_text, write_bytes

OUT = flags.DEFINE_string("out", "claims", "Folder of all that is learnt, drawn and measured.")
DOCS = flags.DEFINE_string("docs", "docs", "Folder that evidence.md is written to.")
BASE = flags.DEFINE_string("base", "emoji", "The model.")
CONCEPTS = flags.DEFINE_string("concepts", None, f"Table of concepts that no setting was chosen by, at least {LEAST}.")
TUNING = flags.DEFINE_string("tuning", None, "Table of other concepts, to choose rates on; without it, as published.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Times that each variant is learnt.", lower_bound=1)
CONFIG = flags.DEFINE_multi_string("config", [], "KEY=VALUE of all runs' configs, the value in JSON.")
ONLY = flags.DEFINE_list("only", [], "Variants to learn and draw now; the report comes when all are there.")

BIASES = (0.3, 0.45, 0.6, 0.7, 0.8)
FEW_BIASES = (0.45, 0.6, 0.75)
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)
TEMPERATURES = (0.05, 0.1, 0.15, 0.2, 0.3)
GLOBAL_BIASES = (0.3, 0.4, 0.5, 0.6)
FIRST_SEED = 1000  # of drawing; training's own pictures, by which the kept step is chosen, begin at 0
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
DEFAULTS = [Setting("defaults", {})]
BY_STRENGTH = swept("strength", STRENGTHS)
VARIANTS = {
    "perfusion": Variant(
        {},
        swept("bias", BIASES) + GLOBAL,
        FEW + swept("temperature", TEMPERATURES),
    ),
    "trained-keys": Variant({"lock_keys": False}, swept("bias", BIASES), []),
    "textual-inversion": Variant({"method": "textual_inversion"}, DEFAULTS, []),
    "lora-1": Variant({"method": "lora"}, BY_STRENGTH, []),
    "lora-4": Variant({"method": "lora", "rank": 4}, BY_STRENGTH, []),
    "custom-diffusion": Variant({"method": "custom_diffusion"}, BY_STRENGTH, []),
    "dreambooth": Variant({"method": "dreambooth"}, BY_STRENGTH, []),
    "mask-found": Variant({"masks": "zero-shot"}, [], FEW),
    "mask-none": Variant({"masks": "none"}, swept("bias", BIASES), FEW),
    **{f"beta-{int(100 * beta)}": Variant({"bias": beta}, [], FEW) for beta in (0.55, 0.65, 0.85)},
    "pictures-1": Variant({}, [], FEW, pictures=1),
    "pictures-2": Variant({}, [], FEW, pictures=2),
    **{f"decay-{d:g}": Variant({"target_input_decay": d}, [], FEW) for d in (0.0, 0.9, 0.999)},
    "straight-through": Variant({"straight_through": True}, [], FEW),
}
TUNED = ["perfusion", *(label for label, variant in VARIANTS.items() if "method" in variant.changes)]
# Times which a method's rates are tried at first; those of the word and of the rest keep their proportion.
FACTORS = (0.3, 1.0, 3.0, 10.0)
MOST_FACTORS = 8
# What is chosen here, and no table may choose for a concept.
CHOSEN = ("seed", "values_rate", "embedding_rate", "weights_rate")
VARIANTS = {label.replace(".", "_"): variant for label, variant in VARIANTS.items()}
METHODS = [label for label, variant in VARIANTS.items() if variant.full]

PAIRS = ("a photo of a {} and a {} on the beach", "a {} next to a {} in the snow")
TRIPLES = ("a photo of a {}, a {} and a {} on the beach", "a {}, a {} and a {} in the city")


class Study(NamedTuple):
    """What all steps share.

    Attributes:
        out: the folder.
        base, evaluator, mesh: from `over_devices`.
        rows: the concepts.
        own: each one's pictures, by name.
    """

    out: epath.Path
    base: BaseModel
    evaluator: Evaluator
    mesh: Mesh | None
    rows: list[Row]
    own: dict[str, list[Picture]]

    def pixels(self, name: str) -> np.ndarray:
        """A concept's own pictures, uint8 [count, side, side, 3]."""
        return np.stack([picture.pixels for picture in self.own[name]])

    def file(self, variant: str, seed: int, name: str) -> epath.Path:
        """Of a concept."""
        return self.out / "runs" / variant / f"seed_{seed}" / "concepts" / f"{name}.safetensors"

    def concepts(self, variant: str = "perfusion", seed: int = 0) -> dict[str, TrainedConcept]:
        """The concepts that a variant has learnt, without those that diverged."""
        files = {row.name: self.file(variant, seed, row.name) for row in self.rows}
        return {name: load_concept(file, self.base) for name, file in files.items() if file.exists()}

    def draw(
        self, prompts: list[str], numbers: list[int], concepts: list[TrainedConcept], **options: Any
    ) -> np.ndarray:
        """Draws on all devices, uint8 [count, side, side, 3]; `numbers`: of seeds, from FIRST_SEED on."""
        ways = self.mesh.size if self.mesh is not None else 1
        whole = -(-min(16, len(prompts)) // ways) * ways
        seeds = [FIRST_SEED + number for number in numbers]
        return generate(self.base, prompts, seeds, concepts, mesh=self.mesh, batch_size=whole, **options)

    def embedded(self) -> dict[str, np.ndarray]:
        """All concepts' own pictures as the instance encoder sees them."""
        return {row.name: self.evaluator.embed_instances(self.pixels(row.name)) for row in self.rows}


def write_table(folder: epath.Path, rows: list[Row], own: dict[str, list[Picture]], count: int) -> epath.Path:
    """Writes a table of concepts with some of their pictures, as files; `count`: how many, 0 for all."""
    table = folder / "concepts.csv"
    if table.exists():
        return table
    columns = sorted({name for row in rows for name in row.overrides if name != "crop"})  # they are cut already
    lines = [["name", "super_category", "pictures", *columns]]
    for row in rows:
        for number, picture in enumerate(own[row.name][: count or None]):
            write_picture(folder / row.name / f"{number}.png", picture.pixels)
            if picture.mask is not None:
                mask = np.round(255 * picture.mask).astype(np.uint8)
                write_picture(folder / row.name / "masks" / f"{number}.png", np.repeat(mask[..., None], 3, axis=2))
            if picture.caption:
                write_bytes(folder / row.name / f"{number}.txt", picture.caption.encode())
        overrides = [str(row.overrides.get(name, "")) for name in columns]
        lines.append([row.name, row.super_category, row.name, *overrides])
    with table.open("w") as file:
        csv.writer(file).writerows(lines)
    return table


def given_config() -> dict[str, Any]:
    """Values of keys from the command line.

    Raises:
        UsageError: they cannot be read, or are what this program chooses.
    """
    found = {}
    for text in CONFIG.value:
        key, _, value = text.partition("=")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError as error:
            raise app.UsageError(f"--config={text}: write KEY=VALUE, the value in JSON ({error})") from error
        if key not in KEYS or key in ("seed", "concepts", "method"):
            raise app.UsageError(f"--config={text}: {key} is no key, or is chosen here")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def make_run(changes: dict[str, Any], table: epath.Path, seed: int) -> ConfigDict:
    """The config of a fleet; `changes`: those of its variant."""
    if changes.get("masks") == "zero-shot":
        changes = {**changes, "masks": "segmenter" if make_config(BASE.value).segmenter else "attention"}
    return make_config(BASE.value, concepts=str(table), seed=seed, **(given_config() | changes))


def learn_fleet(config: ConfigDict, workdir: epath.Path) -> None:
    """Learns a fleet; that all of its concepts diverge is a result."""
    try:
        train_fleet(config, workdir)
    except InputError:
        lines = [json.loads(line) for line in read_text(workdir / "report.jsonl").splitlines()]
        if not lines or any(line["state"] != "diverged" for line in lines):
            raise


def adapt(study: Study) -> dict[str, Tuned]:
    """Chooses each method's learning rates on other concepts, by the score that chooses the kept step."""
    file = study.out / "tuning" / "rates.json"
    kept: dict[str, dict[str, Any]] = json.loads(read_text(file) or "{}")
    if TUNING.value is None:
        return {}
    rows, own = read_concepts(TUNING.value, study.base)
    table = write_table(study.out / "tuning" / "concepts", rows, own, 0)
    for label in TUNED:
        if label in kept:
            continue
        changes = VARIANTS[label].changes
        published = make_run(changes, table, 0)
        others = "weights_rate" if "method" in changes else "values_rate"
        plain = {name: published[name] for name in (others, "embedding_rate") if published[name]}

        def score_of(factor: float, label: str = label, plain: dict[str, float] = plain) -> float:
            rates = {name: factor * rate for name, rate in plain.items()}
            workdir = study.out / "tuning" / label / f"times_{factor:g}"
            learn_fleet(make_run(VARIANTS[label].changes | rates, table, 0), workdir)
            lines = [json.loads(line) for line in read_text(workdir / "report.jsonl").splitlines()]
            # One that diverged shows nothing.
            score = float(np.mean([best_score(workdir, line) for line in lines]))
            print(f"{label}, rates times {factor:g}: score {score:.3f}", flush=True)
            return score

        scores = climb(score_of)
        best = max(scores, key=lambda factor: scores[factor])
        rates = {name: best * rate for name, rate in plain.items()}
        kept[label] = Tuned(rates, {f"{factor:g}": score for factor, score in scores.items()})._asdict()
        write_bytes(file, json.dumps(kept, indent=1).encode())
    return {label: Tuned(**each) for label, each in kept.items()}


def climb(score_of: Callable[[float], float]) -> dict[float, float]:
    """Scores by factor: of FACTORS, and further on as long as the best one is the first or the last."""
    scores = {factor: score_of(factor) for factor in FACTORS}
    while len(scores) < MOST_FACTORS:
        best = max(scores, key=lambda factor: scores[factor])
        if best == min(scores):
            further = best / 3
        elif best == max(scores):
            further = best * 3
        else:
            break
        scores[further] = score_of(further)
    return dict(sorted(scores.items()))


def best_score(workdir: epath.Path, line: dict[str, Any]) -> float:
    """The score of a concept's kept step; 0 of one that diverged."""
    if line["state"] != "done":
        return 0.0
    metrics = [json.loads(text) for text in read_text(workdir / "metrics.jsonl").splitlines()]
    return max((each["score"] for each in metrics if each.get("name") == line["name"] and "score" in each), default=0.0)


def learn(study: Study, label: str, seed: int, tuned: dict[str, Tuned]) -> None:
    """Learns all concepts by a variant."""
    variant = VARIANTS[label]
    table = write_table(study.out / f"pictures_{variant.pictures or 'all'}", study.rows, study.own, variant.pictures)
    own = tuned.get(label if "method" in variant.changes else "perfusion")
    changes = (own.rates if own else {}) | variant.changes
    learn_fleet(make_run(changes, table, seed), study.out / "runs" / label / f"seed_{seed}")


def save_plain(study: Study) -> None:
    """Writes concepts that have learnt nothing: words that are their super-category's."""
    for row in study.rows:
        file = study.file(PLAIN, 0, row.name)
        if not file.exists():
            word = Baseline(study.base.super_category_embedding(row.super_category))
            named = {"name": row.name, "super_category": row.super_category}
            config = make_config(BASE.value, method="textual_inversion", **(given_config() | named))
            save_concept(file, word, make_card(config, study.base, step=0))


def score(study: Study, full: bool, labels: list[str]) -> list[dict[str, Any]]:
    """Draws and scores variants by one of the protocols; returns the lines of all that is there."""
    settings = {label: v.full if full else v.few for label, v in VARIANTS.items() if label in labels}
    settings = {label: own for label, own in settings.items() if own} | {PLAIN: DEFAULTS}
    subjects = [
        Subject(row.name, file, str(study.out / "pictures_all" / row.name), label=label, run=f"{label}_{seed}")
        for label in settings
        for seed in range(SEEDS.value)
        for row in study.rows
        if (file := study.file(label, seed, row.name)).exists()
    ]
    prompts, count = (PROMPTS, 4) if full else (PROMPTS[:10], 2)
    plan = Drawing(prompts, range(FIRST_SEED, FIRST_SEED + count), {"batch_size": 16})
    out = study.out / ("full" if full else "few")
    work = score_all(study.base, study.evaluator, study.mesh, subjects, settings, plan, out)
    total = sum(len(settings[subject.label]) for subject in subjects)
    for _ in tqdm(work, f"{out.name} protocol", total, unit="sheet"):
        pass
    wanted = {(label, setting.label) for label, own in settings.items() for setting in own}
    lines = [line for subject in subjects for line in read_scores(out, subject)]
    return [line for line in lines if (line["label"], line["setting"]) in wanted]


def size(study: Study) -> dict[str, Any]:
    """C1: bytes of a concept, and of the model's weights in float32."""
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(study.base.params))
    learnt = {label: list(study.concepts(label)) for label in METHODS}
    files = {label: study.file(label, 0, names[0]).stat().length for label, names in learnt.items() if names}
    return {"model": weights, "files": files}


def seconds(study: Study) -> dict[str, Any]:
    """C2: seconds that a concept learns as one of a fleet, and the steps that were kept."""
    found = {}
    for label in METHODS:
        text = read_text(study.out / "runs" / label / "seed_0" / "report.jsonl")
        shares = [line.get("chip_seconds", 0.0) for line in map(json.loads, text.splitlines())]
        kept = [card.step for _, card in study.concepts(label).values()]
        if kept:
            config = json.loads(read_text(study.out / "runs" / label / "seed_0" / "config.json"))
            looks = config["steps"] // config["validate_every"] if config["validate_every"] else 1
            found[label] = {"each": float(np.mean(shares)), "kept": kept, "looks": looks}
    return found


def likeness(study: Study) -> dict[str, Any]:
    """The image similarity of concepts' own pictures to each other: what no method is to exceed."""
    return {name: measures.likeness(own) for name, own in study.embedded().items()}


def variety(study: Study) -> dict[str, Any]:
    """C10: how different pictures of one prompt are, under each lock."""
    prompts, seeds = PROMPTS[:6], 6
    found: dict[str, dict[str, float]] = {"local": {}, "global": {}}
    for name, trained in study.concepts().items():
        asked = [prompt.replace("{}", trained.card.phrase) for prompt in prompts for _ in range(seeds)]
        for lock, varied in found.items():
            bias = 0.5 if lock == "global" else 0.6
            drawn = study.draw(asked, list(range(seeds)) * len(prompts), [trained], lock=lock, bias=bias)
            varied[name] = measures.variety(study.evaluator.clip.images(drawn).reshape(len(prompts), seeds, -1))
    return found


def together(study: Study) -> dict[str, Any]:
    """C11: how often each of two and of three concepts is in a picture, and all of them; and without them learnt."""
    known, learnt, plain = study.embedded(), study.concepts(), study.concepts(PLAIN)
    names = list(learnt)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for count, templates in ((2, PAIRS), (3, TRIPLES)):
        shares = found.setdefault(str(count), {"each": {}, "all": {}, "plain": {}, "plain_all": {}})
        for first, name in enumerate(names):
            group = [names[(first + other) % len(names)] for other in range(count)]
            for kind, all_of_them, concepts in (("each", "all", learnt), ("plain", "plain_all", plain)):
                chosen = [concepts[other] for other in group]
                phrases = [card.phrase for _, card in chosen]
                asked = [template.format(*phrases) for template in templates for _ in range(4)]
                drawn = study.draw(asked, [*range(4)] * len(templates), chosen)
                there = measures.presence(study.evaluator.embed_instances, drawn, known)
                each = np.stack([there[other] for other in group])
                shares[kind][name] = float(each.mean())
                shares[all_of_them][name] = float(each.all(axis=0).mean())
    return found


def looked_at(study: Study) -> dict[str, Any]:
    """C12: the share of attention inside the thing of all words that name it, on noisy copies of its own pictures."""
    found: dict[str, dict[str, float]] = {}
    for label in [*METHODS, PLAIN]:
        for name, trained in study.concepts(label).items():
            phrase = trained.card.phrase
            prompt, pieces = f"a photo of a {phrase}", study.base.model.tokenizer.pieces
            named = len(pieces(phrase, [trained.card.placeholder]))
            places = [position for position, _ in pieces(prompt, [trained.card.placeholder])[-named:]]
            noisy = {"init_strength": 0.5, "steps": 20, "attention": True, "batch_size": 1}
            shares = []
            for picture in study.own[name]:
                if picture.mask is None:
                    continue
                maps = next(drawing(study.base, [prompt], [0], [trained], init_image=picture.pixels, **noisy)).attention
                assert maps is not None
                mask = shrink(picture.mask[None], study.base.model.vae_factor)
                shares.append(measures.share_inside(maps[..., places].sum(axis=-1), mask)[0] / mask.mean())
            if shares:
                found.setdefault(label, {})[name] = float(np.mean(shares))
    return found


def of_eight(study: Study) -> dict[str, Any]:
    """C13: of eight pictures of a prompt, how many are good, by concept and prompt."""
    prompts, seeds = PROMPTS[:6], 8
    found: dict[str, list[int]] = {}
    known, plain = study.embedded(), study.concepts(PLAIN)
    for name, learnt in study.concepts().items():
        texts = [prompt.replace("{}", learnt.card.super_category) for prompt in prompts for _ in range(seeds)]
        scores = {}
        for label, trained in (("learnt", learnt), (PLAIN, plain[name])):
            asked = [prompt.replace("{}", trained.card.phrase) for prompt in prompts for _ in range(seeds)]
            drawn = study.draw(asked, list(range(seeds)) * len(prompts), [trained])
            scores[label] = score_pictures(study.evaluator, drawn, texts, known[name])
        least_text = np.repeat(0.9 * scores[PLAIN].text.reshape(len(prompts), seeds).mean(axis=1), seeds)
        least_image = np.full(len(texts), measures.LIKENESS * measures.likeness(known[name]))
        good = measures.good_pictures(scores["learnt"].image, scores["learnt"].text, least_image, least_text)
        found[name] = good.reshape(len(prompts), seeds).sum(axis=1).tolist()
    return found


def gates(study: Study) -> dict[str, Any]:
    """C14: how far gates open, by the place of a token from the concept's word."""
    found: dict[str, dict[str, float]] = {}
    for name, (concept, card) in study.concepts().items():
        assert isinstance(concept, Concept)
        for place, values in measures.gates_by_position(study.base, concept, card, PROMPTS).items():
            found.setdefault(str(place), {})[name] = float(values.mean())
    return found


def diverged(study: Study) -> dict[str, Any]:
    """C15: the share of concepts that diverged, over the seeds of each variant."""
    found = {}
    for label in VARIANTS:
        files = (study.out / "runs" / label / f"seed_{seed}" / "report.jsonl" for seed in range(SEEDS.value))
        lines = [json.loads(line) for file in files for line in read_text(file).splitlines()]
        found[label] = float(np.mean([line["state"] == "diverged" for line in lines]))
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
    """All measures, each kept in a file as long as the concepts are the same."""
    files = [study.file(label, 0, row.name) for label in [*VARIANTS, PLAIN] for row in study.rows]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()
    found = {}
    for name, measure in tqdm(MEASURES.items(), "measuring"):
        file = study.out / "measures" / f"{name}.json"
        kept = json.loads(read_text(file) or "{}")
        if kept.get("concepts") != digest:
            kept = {"concepts": digest, "found": measure(study)}
            write_bytes(file, json.dumps(kept, indent=1).encode())
        found[name] = kept["found"]
    return found


def draw_sheet(study: Study) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Some concepts by each method in one place: rows of pictures, and the words beside rows and columns."""
    learnt = {label: study.concepts(label) for label in [PLAIN, *METHODS]}
    shown = [row.name for row in study.rows if all(row.name in concepts for concepts in learnt.values())][:6]
    rows = [np.stack([study.own[name][0].pixels for name in shown])]
    for concepts in learnt.values():
        asked = [(concepts[name], PROMPTS[1].replace("{}", concepts[name].card.phrase)) for name in shown]
        rows.append(np.stack([study.draw([prompt], [0], [trained])[0] for trained, prompt in asked]))
    return rows, ["its own", *learnt], shown


def read_concepts(table: str, base: BaseModel) -> tuple[list[Row], dict[str, list[Picture]]]:
    """The concepts of a table, and their pictures as they are shown.

    Raises:
        UsageError: it chooses what is chosen here.
    """
    rows = [row for row in read_table(table, OVERRIDES) if not row.problem]
    for row in rows:
        if own := sorted(row.overrides.keys() & set(CHOSEN)):
            raise app.UsageError(f"{row.where}: {own[0]} is chosen here: leave it out")
    side = base.model.picture_side
    own = {}
    for row in rows:
        pictures = read_pictures(row.pictures, row.masks, row.captions)
        own[row.name] = [fit(picture, side, row.overrides.get("crop", True)) for picture in pictures]
    return rows, own


def open_study() -> Study:
    """Loads what all steps share.

    Raises:
        UsageError: the folder holds another study, or the concepts are too few, or some of those that rates are chosen
            on.
    """
    check_plots()
    out = epath.Path(OUT.value)
    config = make_config(BASE.value, **given_config())
    judges = find_judges(config)
    base = load_base_model(BASE.value, dtype=network_dtype())
    evaluator = open_judges(judges, BASE.value, "--config={key}: {error}")
    rows, own = read_concepts(CONCEPTS.value, base)
    others = read_concepts(TUNING.value, base)[0] if TUNING.value else []
    if len(rows) < LEAST:
        raise app.UsageError(f"--concepts: {CONCEPTS.value} has {len(rows)}: give at least {LEAST}")
    for row in rows:
        if any(row.pictures == other.pictures or row.name == other.name for other in others):
            raise app.UsageError(f"--tuning: {row.name} is among --concepts too: choose rates on other concepts")
    facts = {"base": BASE.value, "config": given_config(), "seeds": SEEDS.value, "rows": [row.digest for row in rows]}
    text = json.dumps({**facts, "tuning": [row.digest for row in others], **judges._asdict()}, indent=1)
    if read_text(out / "study.json") not in ("", text):
        raise app.UsageError(f"--out: {out} holds a study of other concepts or settings: name a new folder")
    write_bytes(out / "study.json", text.encode())
    return Study(out, *over_devices(base, evaluator), rows, own)


def command() -> str:
    """What was asked for, as it is typed."""
    flags_of = {"concepts": CONCEPTS, "tuning": TUNING, "out": OUT, "base": BASE, "seeds": SEEDS}
    words = [f"--{name} {shlex.quote(str(flag.value))}" for name, flag in flags_of.items() if flag.value is not None]
    words += [f"--config {shlex.quote(each)}" for each in CONFIG.value]
    return " ".join(["python benchmarks/claims.py", *words])


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes
    labels = ONLY.value or list(VARIANTS)
    if unknown := [label for label in labels if label not in VARIANTS]:
        raise app.UsageError(f"--only: no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    study = open_study()
    write_table(study.out / "pictures_all", study.rows, study.own, 0)
    save_plain(study)
    tuned = adapt(study)
    for seed in range(SEEDS.value):
        for label in labels:
            print(f"learning: {label}, seed {seed}", flush=True)
            learn(study, label, seed, tuned)
    lines = {full: score(study, full, labels) for full in (True, False)}
    if not ONLY.value:
        docs = epath.Path(DOCS.value)
        made = Made(command(), BASE.value, SEEDS.value, tuned)
        write_evidence(docs, lines[True], lines[False], measured(study), draw_sheet(study), made)
        print(docs / "evidence.md")


if __name__ == "__main__":
    flags.mark_flag_as_required("concepts")
    app.run(main)
