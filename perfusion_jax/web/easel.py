"""Draws for the page, picture by picture, and says where each picture looked at each word of its prompt."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perfusion_jax.base_model import BaseModel, load_base_model, network_dtype
from perfusion_jax.drawing.generation import Drawn, drawing
from perfusion_jax.drawing.recipe import DEFAULTS, OPTIONS, Recipe, make_recipe
from perfusion_jax.drawing.rendering import init_pixels, load_concepts
from perfusion_jax.drawing.samplers import check_named, sampler_and_steps
from perfusion_jax.formats.concept_file import digests
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.web.faults import message_of
from perfusion_jax.web.library import Entry

DRAWINGS = "drawings"
"""Folder of all pictures that were drawn, among the runs."""


class _Unwanted(Exception):  # noqa: N818 - nothing went wrong
    """Nobody waits for what is being drawn any more."""


class Word(NamedTuple):
    """A word of a prompt, as the model reads it.

    Attributes:
        text: the word.
        looks: how much each part of the picture looked at it, from its least, 0, to its most, 255: uint8 [height /
            f, width / f].
        least, most: these two as shares of all attention.
    """

    text: str
    looks: np.ndarray
    least: float
    most: float


class Picture(NamedTuple):
    """A picture that was drawn.

    Attributes:
        file: where it lies; it says how it was drawn.
        pixels: uint8 [height, width, 3].
        words: of its prompt.
        label: what is particular to it.
    """

    file: Path
    pixels: np.ndarray
    words: list[Word]
    label: str


class Easel:
    """The base model, loaded when it is first needed, with which one drawing is made at a time.

    Args:
        runs: the studio's folder.
        base: keyword arguments of `load_base_model`.
    """

    def __init__(self, runs: Path, base: Mapping[str, str | None]):
        self.runs = runs
        self.source = dict(base)
        self._busy = threading.Lock()
        self._writing = threading.Lock()
        self._loading = threading.Lock()
        self._loader: threading.Thread | None = None
        self.failure = ""  # why the base model cannot be loaded

    @property
    def base(self) -> BaseModel:
        """The base model.

        Raises:
            InputError, UnavailableError: it cannot be loaded.
        """
        with self._loading:
            try:
                base, self.failure = self._base, ""
            except Exception as error:
                self.failure = f"the base model cannot be loaded: {message_of(error)}"
                raise
            return base

    @cached_property
    def _base(self) -> BaseModel:
        return load_base_model(dtype=network_dtype(), **self.source)  # type: ignore[arg-type]

    @property
    def quick_sampler(self) -> str:
        """What the page draws with unless it is told: DPM-Solver++ in place of DDIM, of whose steps it needs less than
        half; else the model's own, which is empty.
        """
        return (
            "dpm++" if self.is_loaded and sampler_and_steps(self.base.model.schedule, None, None)[0] == "ddim" else ""
        )

    @property
    def is_loaded(self) -> bool:
        """Whether the base model is there; this waits for nothing."""
        return "_base" in self.__dict__

    def load(self, again: bool = False) -> None:
        """Has a thread load the base model, if none does and it is not there.

        Args:
            again: also where that has failed before.
        """
        at_work = self._loader is not None and self._loader.is_alive()
        if self.is_loaded or at_work or (self.failure and not again):
            return
        self.failure = ""

        def work() -> None:
            with suppress(Exception):  # of which `failure` tells
                _ = self.base

        self._loader = threading.Thread(target=work, name="loading", daemon=True)
        self._loader.start()

    def obstacle(self, entry: Entry) -> str:
        """Why a concept cannot be drawn now; empty where it can."""
        if not self.is_loaded:
            return "the base model could not be loaded" if self.failure else "the base model is being loaded"
        if self.base.has_fingerprint(entry.card.fingerprint):
            return ""
        return f"learnt on {entry.card.base_model}; this studio draws on {self.source['source']}"

    def recipe(
        self,
        prompt: str,
        entries: Sequence[Entry],
        count: int,
        seed: int,
        options: Mapping[str, Any],
        init_image: str | None = None,
        sweep: tuple[str, list[float]] | None = None,
    ) -> Recipe:
        """What is to be drawn.

        Args:
            prompt: names the concepts.
            entries: those.
            count, seed, sweep: as for `make_recipe`.
            options: some of OPTIONS; those that are left out are None or the default.
            init_image: a file of the studio's own.
        """
        concepts = [
            {"name": entry.call, "file": str(entry.file), "sha256": digests(entry.file)[0]} for entry in entries
        ]
        whole = dict.fromkeys(OPTIONS) | DEFAULTS | {"batch_size": 1} | dict(options)
        return make_recipe(self.source, concepts, [prompt], count, seed, whole, init_image, sweep)

    def draw(self, recipe: Recipe, wanted: Callable[[], bool] = lambda: True) -> Iterator[Picture]:
        """Draws a recipe picture by picture, and keeps each in the folder of drawings.

        Args:
            recipe: what to draw.
            wanted: whether it still is; asked before each step, and while others draw.

        Raises:
            InputError: it cannot be drawn, or written.
        """
        check_named(self.base.model.schedule, recipe.options["sampler"])
        base, concepts = load_concepts(recipe, self.base)
        options = dict(recipe.options)
        if recipe.init_image:
            options["init_image"] = init_pixels(recipe, base)
        name, values = recipe.sweep or ("", [0.0])
        settings = [({**options, name: value}, f"{name} {value:g}") if name else (options, "") for value in values]

        def ask() -> None:
            if not wanted():
                raise _Unwanted

        # All of them first, for what cannot be drawn is refused here.
        drawings = [
            (drawing(base, recipe.prompts, recipe.seeds, concepts, attention=True, on_step=ask, **each), each, label)
            for each, label in settings
        ]
        placeholders = [card.placeholder for _, card in concepts]
        pieces = base.model.tokenizer.pieces(recipe.prompts[0], placeholders)
        for batches, each, label in drawings:
            number = 0
            while True:
                try:
                    with self._turn(ask):  # others may draw in between
                        ask()
                        drawn = next(batches, None)
                except _Unwanted:
                    return
                if drawn is None:
                    break
                for picture, words in zip(drawn.pixels, _looks(drawn, pieces), strict=True):
                    seed = recipe.seeds[number]
                    record = recipe._replace(
                        prompts=[recipe.prompts[number]],
                        seeds=[seed],
                        columns=1,
                        options={key: each[key] for key in OPTIONS},
                        sweep=None,
                    )
                    file = self._write(picture, record)
                    yield Picture(file, picture, words, ", ".join(filter(None, (f"seed {seed}", label))))
                    number += 1

    @contextmanager
    def _turn(self, ask: Callable[[], None]) -> Iterator[None]:
        """Waits until no other drawing is made; `ask` raises where nobody wants this one any more."""
        while not self._busy.acquire(timeout=0.05):
            ask()
        try:
            yield
        finally:
            self._busy.release()

    def _write(self, pixels: np.ndarray, record: Recipe) -> Path:
        folder = self.runs / DRAWINGS
        with self._writing:
            numbers = [int(file.stem) for file in folder.glob("*.png") if file.stem.isdecimal()]
            file = folder / f"{max(numbers, default=0) + 1:06d}.png"
            write_picture(file, pixels, record._asdict())
        return file

    def drawn_before(self, most: int) -> list[Path]:
        """The latest drawings, the newest first."""
        files = [file for file in (self.runs / DRAWINGS).glob("*.png") if file.stem.isdecimal()]
        return sorted(files, key=lambda file: int(file.stem), reverse=True)[:most]


def _looks(drawn: Drawn, pieces: Sequence[tuple[int, str]]) -> list[list[Word]]:
    """Of each picture the words, with where it looked at each."""
    assert drawn.attention is not None
    found = []
    for seen in drawn.attention:
        words = []
        for position, text in pieces:
            share = seen[:, :, position]
            least, most = float(share.min()), float(share.max())
            looks = np.round(255 * (share - least) / max(most - least, 1e-9)).astype(np.uint8)
            words.append(Word(text, looks, least, most))
        found.append(words)
    return found


def entries_of(recipe: Recipe, entries: Sequence[Entry]) -> list[Entry]:
    """The library's concepts that a picture was drawn with, wherever they lie and whatever they are called now.

    Raises:
        InputError: one of them is not in the library.
    """
    known = {digest: entry for entry in entries for digest in digests(entry.file)}
    missing = next((each["name"] for each in recipe.concepts if each["sha256"] not in known), None)
    if missing is not None:
        raise InputError(f"<{missing}>, with which it was drawn, is not in the library, or has changed since")
    return [known[each["sha256"]] for each in recipe.concepts]
