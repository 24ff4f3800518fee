"""Draws what a recipe asks for, and writes it."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageOps
from tqdm import tqdm

from perfusion_jax.base_model import BaseModel
from perfusion_jax.data.pictures import open_picture
from perfusion_jax.drawing.generation import Drawn, drawing, skipped_steps
from perfusion_jax.drawing.grids import grid
from perfusion_jax.drawing.recipe import Recipe
from perfusion_jax.drawing.samplers import check_named, sampler_and_steps
from perfusion_jax.formats.concept_file import TrainedConcept, load_concept
from perfusion_jax.formats.picture_file import load_recipe, write_picture
from perfusion_jax.formats.tree_folder import load_tree
from perfusion_jax.runtime.errors import InputError, UnavailableError
from perfusion_jax.runtime.files import storage_errors, to_path


def draw(recipe: Recipe, base: BaseModel, attention: bool = False) -> list[list[Drawn]]:
    """Draws what a recipe asks for.

    Returns:
        The batches of pictures for each value of the sweep; without one, for the one setting there is.

    Raises:
        InputError: it cannot be drawn.
    """
    check_named(base.model.schedule, recipe.options["sampler"])
    base, concepts = load_concepts(recipe, base)
    options = dict(recipe.options)
    _, steps = sampler_and_steps(base.model.schedule, options["sampler"], options["steps"])
    if recipe.init_image:
        options["init_image"] = init_pixels(recipe, base)
        steps -= skipped_steps(steps, options["init_strength"])
    name, values = recipe.sweep or ("", [0.0])
    batches = math.ceil(len(recipe.prompts) / options["batch_size"])

    def advance() -> None:
        bar.update()

    # All of them before the bar begins, for what cannot be drawn is refused here.
    swept = [{**options, name: value} if name else options for value in values]
    drawings = [
        drawing(base, recipe.prompts, recipe.seeds, concepts, attention=attention, on_step=advance, **each)
        for each in swept
    ]
    with tqdm(total=len(values) * batches * steps, unit="step") as bar:
        drawn = [list(each) for each in drawings]
    return drawn


def load_concepts(recipe: Recipe, base: BaseModel) -> tuple[BaseModel, list[TrainedConcept]]:
    """Loads the concepts of a recipe, under the names it gives them, and those of its tree.

    Returns:
        The base model, with the tree's kernels if there is a tree; and the concepts.

    Raises:
        InputError: one cannot be loaded, or two have one name.
    """
    concepts = []
    for entry in recipe.concepts:
        concept, card = load_concept(entry["file"], base)
        concepts.append(TrainedConcept(concept, dataclasses.replace(card, name=entry["name"])))
    if recipe.tree:
        base, learnt = load_tree(recipe.tree, base)
        concepts += learnt
    names = [card.name for _, card in concepts]
    twice = max(names, key=names.count, default="")
    if names.count(twice) > 1:
        raise InputError(f"two concepts are called {twice}: give one another name, as in --concept other_{twice}=FILE")
    return base, concepts


def init_pixels(recipe: Recipe, base: BaseModel) -> np.ndarray:
    """The picture to start from, cut to the size of the pictures asked for: uint8 [height, width, 3].

    Raises:
        InputError: it cannot be read.
    """
    native = base.model.picture_side
    size = (recipe.options["width"] or native, recipe.options["height"] or native)
    assert recipe.init_image is not None
    image = open_picture(to_path(recipe.init_image)).convert("RGB")
    return np.asarray(ImageOps.fit(image, size, Image.Resampling.LANCZOS))


def files_of(recipe: Recipe, out: epath.Path) -> list[epath.Path]:
    """The files that `write` writes: of several pictures without a sweep each one's, and at last `out`."""
    count = 0 if recipe.sweep or len(recipe.prompts) == 1 else len(recipe.prompts)
    return [*(out.with_stem(f"{out.stem}_{number}") for number in range(count)), out]


def check_replaced(files: Sequence[epath.Path]) -> None:
    """Sees, before anything is drawn, that no picture of somebody's own will be replaced, but drawn ones alone.

    Raises:
        InputError: one does not say how it was drawn.
        UnavailableError: storage fails.
    """
    for file in files:
        with storage_errors(file, "read"):
            there = file.exists()
        try:
            if there:
                load_recipe(file)
        except UnavailableError:
            raise
        except InputError as error:
            raise InputError(
                f"{file}: is there already, and perfusion_jax.sample has not drawn it: name another file, or move it"
            ) from error


def write(recipe: Recipe, drawn: list[list[Drawn]], out: epath.Path) -> None:
    """Writes pictures: a single one to `out`; several each beside it, as NAME_0.png and so on, and their grid to `out`.

    Raises:
        InputError, UnavailableError: they cannot be written.
    """
    record = recipe._asdict()
    pixels = np.stack([np.concatenate([some.pixels for some in batches]) for batches in drawn])
    if recipe.sweep:
        # A row per picture, a column per value.
        name, values = recipe.sweep
        rows = list(np.moveaxis(pixels, 0, 1))
        labels = [f"{prompt}, seed {seed}" for prompt, seed in zip(recipe.prompts, recipe.seeds, strict=True)]
        write_picture(out, grid(rows, labels, [f"{name} {value:g}" for value in values]), record)
        return
    pictures = pixels[0]
    if len(pictures) == 1:
        write_picture(out, pictures[0], record)
        return
    for number, (picture, file) in enumerate(zip(pictures, files_of(recipe, out)[:-1], strict=True)):
        of_one = {"prompts": [recipe.prompts[number]], "seeds": [recipe.seeds[number]], "columns": 1}
        write_picture(file, picture, {**record, **of_one})
    rows = [pictures[first : first + recipe.columns] for first in range(0, len(pictures), recipe.columns)]
    labels = recipe.prompts[:: recipe.columns] if len(set(recipe.prompts)) > 1 else []
    write_picture(out, grid(rows, labels), record)
