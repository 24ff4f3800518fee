"""What is evaluated: learnt concepts, each with pictures of its own to compare with."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from perfusion_jax.config import OVERRIDES
from perfusion_jax.data.pictures import fit
from perfusion_jax.data.sources import read_pictures
from perfusion_jax.data.table import Row, read_table
from perfusion_jax.formats.concept_file import read_card
from perfusion_jax.learning.workdir import CONFIG, concept_file
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import is_local, read_text, storage_errors, to_path

ALL = "all"
"""The label of what has none."""


class Base(NamedTuple):
    """A base model, as the keyword arguments of `load_base_model` say it."""

    source: str
    revision: str | None
    variant: str | None


class Subject(NamedTuple):
    """A concept to evaluate.

    Attributes:
        name: prompts call it `<name>`.
        file: of the concept.
        pictures: its own, as `config.pictures`.
        masks, captions: folders beside them, or empty.
        crop: whether pictures are cut to a square, as they were learnt.
        label: what reports call all that was learnt in one way, such as a method's name.
        run: the label, or where the label has several workdirs, the label and the number of this one's.
        base: that it was learnt on, as its run says; None where no run does.
    """

    name: str
    file: epath.Path
    pictures: str
    masks: str = ""
    captions: str = ""
    crop: bool = True
    label: str = ALL
    run: str = ALL
    base: Base | None = None

    @property
    def folder(self) -> str:
        """Where its scores and sheets go, below those of all."""
        return self.name if self.run == ALL else f"{self.run}/{self.name}"

    def own(self, side: int) -> np.ndarray:
        """Its own pictures, uint8 [count, side, side, 3].

        Raises:
            InputError, UnavailableError: they cannot be read.
        """
        pictures = read_pictures(self.pictures, self.masks, self.captions)
        return np.stack([fit(picture, side, self.crop).pixels for picture in pictures])


def of_workdirs(given: Sequence[str]) -> list[Subject]:
    """The concepts that runs and fleets have finished.

    Args:
        given: workdirs, each with a label before it or without one: `FOLDER`, or `LABEL=FOLDER` where there is no
            folder of that whole name. Several workdirs of one label are repetitions, as by other seeds.

    Raises:
        InputError, UnavailableError: as for `of_workdir`.
    """
    subjects: list[Subject] = []
    seen: Counter[str] = Counter()
    for text in given:
        match = re.fullmatch(r"([A-Za-z0-9_-]+)=(.+)", text, re.DOTALL)
        whole = match is None or (is_local(text) and to_path(text).exists())
        label, folder = (ALL, text) if match is None or whole else (match[1], match[2])
        seen[label] += 1
        run = label if label == ALL or seen[label] == 1 else f"{label}_{seen[label]}"
        subjects += [subject._replace(label=label, run=run) for subject in of_workdir(to_path(folder))]
    return subjects


def of_workdir(workdir: epath.Path) -> list[Subject]:
    """The concepts that a run or a fleet has finished, in the order of its table.

    Raises:
        InputError: it is no workdir, or nothing in it is finished.
        UnavailableError: storage fails.
    """
    text = read_text(workdir / CONFIG)
    if not text:
        raise InputError(f"{workdir}: no {CONFIG} in it: give the --workdir of a run, or --concept and --pictures")
    try:
        config = json.loads(text)
        crop, table = config["crop"], config["concepts"]
        base = Base(config["base"], config.get("revision") or None, config.get("variant") or None)
        rows = read_table(table, OVERRIDES) if table else [_row(config)]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{workdir / CONFIG}: cannot be read ({error!r})") from error
    subjects = [
        Subject(
            row.name,
            concept_file(workdir, row.name),
            row.pictures,
            row.masks,
            row.captions,
            row.overrides.get("crop", crop),
            base=base,
        )
        for row in rows
        if not row.problem
    ]
    with storage_errors(workdir, "read"):
        finished = [subject for subject in subjects if subject.file.exists()]
    if not finished:
        raise InputError(f"{workdir}: no concept in it is finished yet")
    return finished


def of_files(files: Sequence[str], pictures: Sequence[str]) -> list[Subject]:
    """Concepts by their files, each with the pictures that stand at the same place.

    Raises:
        InputError: there are not as many of one as of the other, or a file is no concept.
        UnavailableError: storage fails.
    """
    if len(files) != len(pictures):
        raise InputError(
            f"--concept is given {len(files)} times and --pictures {len(pictures)} times: give each concept its own"
        )
    return [Subject(read_card(file).name, to_path(file), folder) for file, folder in zip(files, pictures, strict=True)]


def base_of(subjects: Sequence[Subject], given: Any) -> Base:
    """The base model of an evaluation.

    Args:
        subjects: what is evaluated.
        given: `base`, `revision` and `variant`, each None where nobody has said it. Without a base it is that of the
            runs, and where there are none, `emoji`.

    Raises:
        InputError: the runs are of several.
    """
    of_runs = {subject.base for subject in subjects if subject.base}
    if given.base or not of_runs:
        return Base(given.base or "emoji", given.revision, given.variant)
    if len(of_runs) > 1:
        names = ", ".join(sorted({base.source for base in of_runs}))
        raise InputError(
            f"--workdir: these runs are of several base models, {names}: evaluate them apart, or give --base"
        )
    (base,) = of_runs
    return base._replace(revision=given.revision or base.revision, variant=given.variant or base.variant)


def check_names(subjects: Sequence[Subject]) -> None:
    """Sees that no two concepts of one run are called alike.

    Raises:
        InputError: two are.
    """
    for folder, count in Counter(subject.folder for subject in subjects).items():
        if count > 1:
            name = folder.rpartition("/")[2]
            raise InputError(f"two concepts are called {name}: give their workdirs labels, or evaluate them apart")


def _row(config: dict[str, str]) -> Row:
    return Row(config["name"], config["super_category"], config["pictures"], "", "", {}, {}, "")
