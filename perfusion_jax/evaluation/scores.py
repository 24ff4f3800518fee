"""Drawing and scoring concepts: a line of `scores.jsonl` for each concept under each setting, and a sheet of pictures.

    {"name": "rex", "concept": "9f2c...", "setting": "bias 0.6", "image": [...], "text": [...], "precision": [...]}

`concept` is the SHA-256 of its file: what is learnt anew is drawn anew. The lists have a number for each picture,
prompt by prompt (`learning.metrics.Scores` says what they are).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh
from PIL import Image

from perfusion_jax.base_model import BaseModel
from perfusion_jax.drawing.generation import generate
from perfusion_jax.drawing.grids import grid
from perfusion_jax.evaluation.subjects import Subject
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.metrics import Evaluator, score_pictures
from perfusion_jax.pod.mesh import place
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import read_text, storage_errors, write_bytes

PROMPTS = (
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a photo of a {} at night",
    "a photo of a {} in the desert",
    "a photo of a {} in the forest",
    "a photo of a {} in the city",
    "a photo of a {} under water",
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
"""Twenty prompts that no default of training has: places, styles, something worn, another thing."""

SHOWN_SIDE = 256
"""Of pictures in sheets, at most."""
COLUMNS = 10
SCORES = "scores.jsonl"


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


def read_scores(out: epath.Path) -> list[dict[str, Any]]:
    """The lines that are written already.

    Raises:
        InputError: the file is damaged.
        UnavailableError: storage fails.
    """
    try:
        return [json.loads(line) for line in read_text(out / SCORES).splitlines()]
    except json.JSONDecodeError as error:
        raise InputError(f"{out / SCORES}: not JSON on each line ({error}); delete it to draw all anew") from error


def over_devices(base: BaseModel) -> tuple[BaseModel, Mesh | None]:
    """The model whole on each device of this process, and a mesh of them; None where there is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return base, None
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    return dataclasses.replace(base, params=place(base.params, mesh)), mesh


def score_all(
    base: BaseModel,
    mesh: Mesh | None,
    evaluator: Evaluator,
    subjects: Sequence[Subject],
    settings: Sequence[Setting],
    plan: Drawing,
    out: epath.Path,
) -> Iterator[dict[str, Any]]:
    """Draws and scores what is missing; gives each line as it is written.

    Args:
        base, mesh: from `over_devices`.
        evaluator: what pictures are judged by.
        subjects: the concepts.
        settings: each concept is drawn under all of them, from the same noise.
        plan: what is drawn.
        out: a folder, local or in a bucket.

    Raises:
        InputError: a concept, its pictures or a prompt cannot be used.
        UnavailableError: storage fails.
    """
    lines = read_scores(out)
    ways = mesh.size if mesh is not None else 1
    options = {**plan.options, "batch_size": -(-plan.options["batch_size"] // ways) * ways, "mesh": mesh}
    for subject in subjects:
        with storage_errors(subject.file, "read"):
            digest = hashlib.sha256(subject.file.read_bytes()).hexdigest()
        lines = [line for line in lines if line["name"] != subject.name or line["concept"] == digest]
        done = {line["setting"] for line in lines if line["name"] == subject.name}
        missing = [setting for setting in settings if setting.label not in done]
        if not missing:
            continue
        trained = load_concept(subject.file, base)
        own = subject.own(base.model.picture_side)
        embedded = evaluator.embed_instances(own)
        folder = out / "pictures" / subject.name
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
            lines.append({"name": subject.name, "concept": digest, "setting": setting.label, **facts})
            write_bytes(out / SCORES, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
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
