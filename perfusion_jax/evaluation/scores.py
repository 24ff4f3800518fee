"""Drawing and scoring concepts: a sheet of pictures under each setting, and a line of `scores/NAME.jsonl`.

    {"name": "rex", "label": "perfusion", "concept": "9f2c...", "setting": "bias 0.6", "image": [...], "text": [...],
     "precision": [...]}

`concept` is the SHA-256 of its file: what is learnt anew is drawn anew. The lists have a number for each picture,
prompt by prompt (`learning.metrics.Scores` says what they are). Each concept has files of its own, so that many jobs
can share the work.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh
from PIL import Image

from perfusion_jax.base_model import BaseModel
from perfusion_jax.drawing.arguments import parse_sweep
from perfusion_jax.drawing.controls import check_controls
from perfusion_jax.drawing.generation import generate
from perfusion_jax.drawing.grids import grid
from perfusion_jax.evaluation.subjects import Subject
from perfusion_jax.formats.concept_file import load_concept, read_card
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.metrics import Evaluator, score_pictures
from perfusion_jax.pod.mesh import place
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import read_text, storage_errors, write_bytes

PROMPTS = (
    "a photo of a {} in the garden",
    "a photo of a {} in the rain",
    "a photo of a {} at night",
    "a photo of a {} in the desert",
    "a photo of a {} in the forest",
    "a photo of a {} at sunset",
    "a photo of a {} in the kitchen",
    "a photo of a {} on the grass",
    "a photo of a {} in the mountains",
    "a photo of a {} on a table",
    "a {}",
    "a {} on the beach at night",
    "a pencil sketch of a {}",
    "a black and white photo of a {}",
    "a black and white photo of a {} in the city",
    "a photo of a {} wearing a hat",
    "a photo of a {} next to a tree",
    "a photo of a {} and a car in the snow",
    "a photo of a {} and a cat on the grass",
    "a photo of an apple and a {} on a table",
)
"""Twenty prompts: places, styles, something worn, another thing. By default neither training nor what chooses the kept
step has one of them."""

SHOWN_SIDE = 256
"""Of pictures in sheets, at most."""
COLUMNS = 10


class Setting(NamedTuple):
    """A way to draw.

    Attributes:
        label: what reports call it.
        controls: keyword arguments of `generation.drawing`, such as the bias.
    """

    label: str
    controls: dict[str, float]


class Drawing(NamedTuple):
    """What is the same for all concepts and settings.

    Attributes:
        prompts: with one `{}` each.
        seeds: of each prompt's pictures.
        options: other keyword arguments of `generation.drawing`, the batch size among them.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    options: dict[str, Any]


def settings_of(sweeps: Sequence[str], subjects: Sequence[Subject]) -> dict[str, list[Setting]]:
    """The settings of each label.

    Args:
        sweeps: `CONTROL=FIRST:LAST:COUNT`, or `LABEL:CONTROL=FIRST:LAST:COUNT` for one label alone.
        subjects: what is to be drawn.

    Raises:
        InputError: a sweep says something else, its label is not known, a label has two, or one of its concepts was
            learnt by a method that has no such control.
        UnavailableError: storage fails.
    """
    labels = {subject.label for subject in subjects}
    found: dict[str, list[Setting]] = {}
    for text in sweeps:
        match = re.fullmatch(r"(?:([A-Za-z0-9_-]+):)?(.*)", text)
        label, sweep = (match[1] or "", parse_sweep(match[2])) if match else ("", parse_sweep(text))
        assert sweep is not None
        if label and label not in labels:
            raise InputError(f"--sweep={text}: no --workdir has the label {label}")
        if label in found:
            raise InputError(f"--sweep={text}: {label or 'what has no label'} is swept already")
        found[label] = [Setting(f"{sweep[0]} {value:g}", {sweep[0]: value}) for value in sweep[1]]
    general = found.get("", [Setting("defaults", {})])
    settings = {label: found.get(label, general) for label in labels}
    for subject in subjects if sweeps else ():
        try:
            check_controls(
                read_card(subject.file), {name for each in settings[subject.label] for name in each.controls}
            )
        except InputError as error:
            raise InputError(f"--sweep: {error}; sweep its strength, as LABEL:strength=FIRST:LAST:COUNT") from error
    return settings


def read_scores(out: epath.Path, subject: Subject) -> list[dict[str, Any]]:
    """The lines of a concept that are written already.

    Raises:
        InputError: the file is damaged.
        UnavailableError: storage fails.
    """
    file = _file(out, subject)
    try:
        return [json.loads(line) for line in read_text(file).splitlines()]
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not JSON on each line ({error}); delete it to draw the concept anew") from error


def _file(out: epath.Path, subject: Subject) -> epath.Path:
    return out / "scores" / f"{subject.folder}.jsonl"


def over_devices(base: BaseModel, evaluator: Evaluator) -> tuple[BaseModel, Evaluator, Mesh | None]:
    """The model and its judges whole on each device of this process, and a mesh of them; None where there is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return base, evaluator, None
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    clip = dataclasses.replace(evaluator.clip, params=place(evaluator.clip.params, mesh))
    instance = evaluator.instance
    if instance is not None:
        instance = dataclasses.replace(instance, params=place(instance.params, mesh))
    return dataclasses.replace(base, params=place(base.params, mesh)), Evaluator(clip, instance), mesh


def score_all(
    base: BaseModel,
    evaluator: Evaluator,
    mesh: Mesh | None,
    subjects: Sequence[Subject],
    settings: Mapping[str, Sequence[Setting]],
    plan: Drawing,
    out: epath.Path,
    begin: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Draws and scores what is missing; gives each line as it is written.

    Args:
        base, evaluator, mesh: from `over_devices`.
        subjects: the concepts.
        settings: by label; each concept is drawn under all of its label's, from the same noise.
        plan: what is drawn.
        out: a folder, local or in a bucket.
        begin: is called before the first line is written: until then, nothing of what is wrong with an evaluation has
            left anything that a mended one would not go with.

    Raises:
        InputError: a concept, its pictures or a prompt cannot be used.
        UnavailableError: storage fails.
    """
    begun = False
    ways = mesh.size if mesh is not None else 1
    options = {**plan.options, "batch_size": -(-plan.options["batch_size"] // ways) * ways, "mesh": mesh}
    for subject in subjects:
        with storage_errors(subject.file, "read"):
            digest = hashlib.sha256(subject.file.read_bytes()).hexdigest()
        lines = [line for line in read_scores(out, subject) if line["concept"] == digest]
        done = {line["setting"] for line in lines}
        missing = [setting for setting in settings[subject.label] if setting.label not in done]
        if not missing:
            continue
        trained = load_concept(subject.file, base)
        own = subject.own(base.model.picture_side)
        embedded = evaluator.embed_instances(own)
        folder = out / "pictures" / subject.folder
        write_picture(folder / "own.png", sheet(own))
        prompts = [prompt for prompt in plan.prompts for _ in plan.seeds]
        named = [prompt.replace("{}", trained.card.phrase) for prompt in prompts]
        texts = [prompt.replace("{}", trained.card.super_category) for prompt in prompts]
        seeds = [seed for _ in plan.prompts for seed in plan.seeds]
        for setting in missing:
            drawn = generate(base, named, seeds, [trained], **options, **setting.controls)
            write_picture(folder / f"{file_name(setting)}.png", sheet(drawn[:: len(plan.seeds)]))
            scores = score_pictures(evaluator, drawn, texts, embedded)
            facts = {name: values.round(5).tolist() for name, values in scores._asdict().items()}
            known = {"name": subject.name, "label": subject.label, "concept": digest, "setting": setting.label}
            lines.append({**known, **facts})
            if not begun:
                begin()
                begun = True
            write_bytes(_file(out, subject), "".join(f"{json.dumps(line)}\n" for line in lines).encode())
            yield lines[-1]


def file_name(setting: Setting) -> str:
    """The name of a setting's sheets, without `.png`."""
    return setting.label.replace(" ", "_")


def sheet(pictures: np.ndarray) -> np.ndarray:
    """Pictures side by side, COLUMNS in a row, at most SHOWN_SIDE pixels high and wide each."""
    if max(pictures.shape[1:3]) > SHOWN_SIDE:
        size = (SHOWN_SIDE, SHOWN_SIDE)
        pictures = np.stack([np.asarray(Image.fromarray(each).resize(size)) for each in pictures])
    return grid([pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)])
