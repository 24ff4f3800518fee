"""How a file of pictures was drawn: all that it depends on, as plain JSON that is kept in the file itself."""

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from etils import epath
from PIL import Image, ImageOps
from tqdm import tqdm

from perfusion_jax.base_model import BaseModel
from perfusion_jax.data.pictures import open_picture
from perfusion_jax.drawing.generation import Drawn, drawing, skipped_steps
from perfusion_jax.drawing.grids import grid
from perfusion_jax.drawing.prompts import escaped, without_syntax
from perfusion_jax.drawing.samplers import check_named, make_plan, settle, spaced
from perfusion_jax.formats.concept_file import PERFUSION, TrainedConcept, load_concept, read_card, read_file
from perfusion_jax.formats.picture_file import load_recipe, write_picture
from perfusion_jax.formats.tree_folder import load_tree
from perfusion_jax.runtime.errors import InputError, UnavailableError
from perfusion_jax.runtime.files import is_local, storage_errors, to_path

FORMAT = "perfusion_jax picture 1"
LIBRARIES = ("perfusion_jax", "jax", "flax", "diffusers")
CONTROLS = ("bias", "temperature", "strength", "start", "end")
FLAGS = ("concept", "tree", "prompt", "prompts", "num_images", "seed", "init_image", "sweep")
"""What a recipe is made of beside the options and the base model, as flags."""

OPTIONS = (
    *CONTROLS,
    *("sampler", "steps", "spacing", "guidance", "guidance_rescale", "negative_prompt", "lock", "height", "width"),
    *("init_strength", "batch_size"),
)

DEFAULTS = {"guidance_rescale": 0.0, "lock": "local", "init_strength": 0.8}
"""Of the options; those of the others are None."""


class Recipe(NamedTuple):
    """All that a file of pictures depends on, as plain JSON.

    Attributes:
        base: keyword arguments of `load_base_model`.
        concepts: `name`, `file` and `sha256` of each.
        prompts, seeds: one per picture.
        columns: pictures side by side in the grid.
        options: of `generation.drawing`.
        init_image: a file, or None.
        sweep: a control and its values, if one is swept: the grid then has a column for each value.
        versions: of the libraries.
        format: of this record.
        tree: an exported tree (`formats.tree_folder`), whose kernels and concepts are drawn with, or None.
    """

    base: dict[str, str | None]
    concepts: list[dict[str, str]]
    prompts: list[str]
    seeds: list[int]
    columns: int
    options: dict[str, Any]
    init_image: str | None
    sweep: tuple[str, list[float]] | None
    versions: dict[str, str]
    format: str = FORMAT
    tree: str | None = None


def numbers(name: str, given: Sequence[str]) -> list[float] | None:
    """The values of a list flag, or None if it was not given.

    Raises:
        InputError: not numbers.
    """
    try:
        return [float(value) for value in given] or None
    except ValueError as error:
        raise InputError(f"--{name}={','.join(given)}: not numbers") from error


def parse_sweep(given: str | None) -> tuple[str, list[float]] | None:
    """Reads `bias=0.4:0.8:5`: a control, its first and last value, and how many.

    Raises:
        InputError: it says something else.
    """
    if given is None:
        return None
    name, _, values = given.partition("=")
    try:
        first, last, count = values.split(":")
        numbers = float(first), float(last), int(count)
    except ValueError as error:
        raise InputError(f"--sweep={given}: write CONTROL=FIRST:LAST:COUNT, such as bias=0.4:0.8:5") from error
    try:
        return sweep_over(name, *numbers)
    except InputError as error:
        raise InputError(f"--sweep={given}: {error}") from error


def sweep_over(name: str, first: float, last: float, count: int) -> tuple[str, list[float]]:
    """A control, and `count` values of it from the first to the last.

    Raises:
        InputError: it is none that is swept, or there is no value.
    """
    if name not in (*CONTROLS, "guidance") or count < 1:
        raise InputError(f"{name}: sweeps one of {', '.join(CONTROLS)}, guidance over at least one value")
    return name, np.linspace(first, last, count).round(6).tolist()


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """The prompts to draw: one, or those of a file, a line each.

    Raises:
        InputError: neither or both are given, or the file has none or cannot be read.
        UnavailableError: storage fails.
    """
    if (prompt is None) == (file is None):
        raise InputError("give --prompt or --prompts, one of them")
    if prompt is not None:
        return [prompt]
    assert file is not None
    path = to_path(file)
    with storage_errors(path, "read"):
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{file}: no prompts in it; write one on a line")
    return prompts


def read_concepts(given: Sequence[str]) -> list[dict[str, str]]:
    """What a recipe says of concept files, `FILE` or `NAME=FILE`; the same file given twice counts once.

    Raises:
        InputError: a file cannot be read, or is none of a concept.
        UnavailableError: storage fails.
    """
    found = []
    for word in given:
        name, file = word.split("=", 1) if _names_a_file(word) else ("", word)
        entry = {"name": name or read_card(file).name, "file": file, "sha256": _sha256(file)}
        if entry not in found:
            found.append(entry)
    return found


def _names_a_file(word: str) -> bool:
    """Whether a word is NAME=FILE; a folder, a bucket or a file may have = in its name, too."""
    name, sign, _ = word.partition("=")
    return bool(sign) and "/" not in name and not (is_local(word) and to_path(word).exists())


def _sha256(file: str) -> str:
    return hashlib.sha256(read_file(file)).hexdigest()


def _plain(prompt: str) -> str:
    """A prompt without what other programs read in it; says on stderr what was taken out."""
    plain, found = without_syntax(prompt)
    if found:
        print(
            f"warning: {', '.join(found)}: weights, brackets, keywords and LoRAs of other programs do nothing here; "
            f"drawing {plain!r}",
            file=sys.stderr,
        )
    return plain


def recipe_of_flags(arguments: flags.FlagValues) -> Recipe:
    """What the command line asks for.

    Raises:
        InputError: a flag's value is not of its kind.
    """
    options = {name: getattr(arguments, name) for name in OPTIONS}
    options |= {name: numbers(name, options[name]) for name in CONTROLS}
    return make_recipe(
        {"source": arguments.base, "revision": arguments.revision, "variant": arguments.variant},
        read_concepts(arguments.concept),
        read_prompts(arguments.prompt, arguments.prompts),
        arguments.num_images,
        arguments.seed,
        options,
        init_image=arguments.init_image,
        sweep=parse_sweep(arguments.sweep),
        tree=arguments.tree,
    )


def make_recipe(
    base: dict[str, str | None],
    concepts: list[dict[str, str]],
    prompts: Sequence[str],
    count: int,
    seed: int,
    options: Mapping[str, Any],
    init_image: str | None = None,
    sweep: tuple[str, list[float]] | None = None,
    tree: str | None = None,
) -> Recipe:
    """The recipe of some pictures of each prompt.

    Args:
        base, concepts, init_image, sweep, tree: as in a `Recipe`.
        prompts: what other programs read in them is taken out, and a warning says so.
        count: pictures of each prompt.
        seed: of the first; the next has the next.
        options: all of OPTIONS.
    """
    prompts, options = [_plain(prompt) for prompt in prompts], dict(options)
    if options["negative_prompt"] is not None:
        options["negative_prompt"] = _plain(options["negative_prompt"])
    options["batch_size"] = min(options["batch_size"], count * len(prompts))
    return Recipe(
        base=base,
        concepts=concepts,
        prompts=[prompt for prompt in prompts for _ in range(count)],
        seeds=list(range(seed, seed + count)) * len(prompts),
        columns=count if len(prompts) > 1 else math.ceil(math.sqrt(count)),
        options=options,
        init_image=init_image,
        sweep=sweep,
        versions={library: version(library) for library in LIBRARIES},
        tree=tree,
    )


def command_of(recipe: Recipe, out: str) -> list[str]:
    """The words of the command that draws a recipe of one prompt anew; those of options that are the default are left
    out.

    Args:
        recipe: what is drawn.
        out: the file to write.
    """
    given: dict[str, Any] = {
        "base": None if recipe.base["source"] == "emoji" else recipe.base["source"],
        "revision": recipe.base["revision"],
        "variant": recipe.base["variant"],
        "tree": recipe.tree,
        "prompt": escaped(recipe.prompts[0]),
        "num_images": len(recipe.prompts),
        "seed": recipe.seeds[0],
        **{name: value for name, value in recipe.options.items() if value != DEFAULTS.get(name)},
        "init_image": recipe.init_image,
    }
    if given.get("negative_prompt") is not None:
        given["negative_prompt"] = escaped(given["negative_prompt"])
    if not recipe.init_image:
        given.pop("init_strength", None)
    if recipe.sweep:
        name, values = recipe.sweep
        given["sweep"] = f"{name}={_exact(values[0])}:{_exact(values[-1])}:{len(values)}"
    words = ["python", "-m", "perfusion_jax.sample"]
    for entry in recipe.concepts:
        words += ["--concept", f"{entry['name']}={entry['file']}"]
    for name, value in given.items():
        if value is not None:
            text = ",".join(map(_exact, value)) if isinstance(value, list) else f"{value}"
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return [*words, "--out", out]


def _exact(number: float) -> str:
    """A number as short as it can be written so that the same one is read."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def read_recipe(file: str | os.PathLike[str]) -> Recipe:
    """What a picture says of how it was drawn; nothing that it names is looked at.

    Raises:
        InputError: it does not say.
        UnavailableError: storage fails.
    """
    record = load_recipe(file)
    # Older pictures say nothing of these two.
    known = record.get("format") == FORMAT and record.keys() | {"tree"} == set(Recipe._fields)
    if not known or not isinstance(record["options"], dict) or record["options"].keys() | {"spacing"} != set(OPTIONS):
        raise InputError(f"{file}: it was drawn by another version of perfusion_jax: {json.dumps(record)}")
    recipe = Recipe(**{**record, "options": {"spacing": None, **record["options"]}})
    wrong = _impossible(recipe)
    if wrong:
        value = {**recipe.options, **recipe._asdict()}[wrong]
        raise InputError(f"{file}: its record of how it was drawn was changed: {wrong} cannot be {json.dumps(value)}")
    return recipe


def _impossible(recipe: Recipe) -> str:
    """The first field or option of a recipe from a file that is of no kind that it can be; empty if there is none."""

    def text(value: Any) -> bool:
        return isinstance(value, str)

    def whole(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**32

    def number(value: Any) -> bool:
        return type(value) in (int, float)

    def list_of(kind: Callable[[Any], bool], value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(map(kind, value))

    def control(value: Any) -> bool:
        return number(value) or list_of(number, value)

    def concept(value: Any) -> bool:
        return isinstance(value, dict) and value.keys() == {"name", "file", "sha256"} and all(map(text, value.values()))

    def sweep(value: Any) -> bool:
        known = isinstance(value, list) and len(value) == 2 and value[0] in (*CONTROLS, "guidance")
        return known and list_of(number, value[1])

    base, options, versions = recipe.base, recipe.options, recipe.versions
    is_base = isinstance(base, dict) and base.keys() == {"source", "revision", "variant"} and text(base["source"])
    possible = {
        "base": is_base and all(value is None or text(value) for value in base.values()),
        "concepts": recipe.concepts == [] or list_of(concept, recipe.concepts),
        "prompts": list_of(text, recipe.prompts),
        "seeds": list_of(whole, recipe.seeds) and len(recipe.seeds) == len(recipe.prompts),
        "columns": whole(recipe.columns) and recipe.columns > 0,
        "init_image": recipe.init_image is None or text(recipe.init_image),
        "sweep": recipe.sweep is None or sweep(recipe.sweep),
        "versions": isinstance(versions, dict)
        and versions.keys() <= set(LIBRARIES)
        and all(map(text, versions.values())),
        "tree": recipe.tree is None or text(recipe.tree),
        "batch_size": whole(options["batch_size"]) and options["batch_size"] > 0,
    }
    kinds = {**dict.fromkeys(CONTROLS, control), **dict.fromkeys(("steps", "height", "width"), whole)}
    kinds |= dict.fromkeys(("guidance", "guidance_rescale", "init_strength"), number)
    kinds |= dict.fromkeys(("sampler", "spacing", "negative_prompt", "lock"), text)
    possible |= {name: options[name] is None or kind(options[name]) for name, kind in kinds.items()}
    return next((name for name, is_possible in possible.items() if not is_possible), "")


def recipe_of_picture(file: str | os.PathLike[str], base_given: bool, base: str) -> Recipe:
    """How a picture was drawn.

    Args:
        file: that picture.
        base_given: whether the user named a base model.
        base: that base model.

    Raises:
        InputError: it does not say, or names a base model that the user did not, or a concept is not what it was.
        UnavailableError: storage fails.
    """
    recipe = read_recipe(file)
    source = recipe.base["source"]
    if source != "emoji" and not (base_given and base == source):
        # A picture from somewhere must not decide what is fetched from where.
        raise InputError(f"{file}: drawn on the base model {source}; give --base {source} to load it")
    for entry in recipe.concepts:
        if _sha256(entry["file"]) != entry["sha256"]:
            raise InputError(f"{entry['file']}: the concept has changed since {file} was drawn")
    for library, then in recipe.versions.items():
        if version(library) != then:
            print(f"warning: drawn with {library} {then}; this is {version(library)}", file=sys.stderr)
    return recipe


def warn_of_unnamed(recipe: Recipe) -> None:
    """Says on stderr which concepts have no effect, for no prompt names them."""
    for words in unnamed(recipe):
        print(f"warning: {words}", file=sys.stderr)


def unnamed(recipe: Recipe) -> list[str]:
    """Warnings of concepts that have no effect, for no prompt names them."""
    found = []
    for entry in recipe.concepts:
        if not any(f"<{entry['name']}>" in prompt for prompt in recipe.prompts):
            method = read_card(entry["file"]).method
            adds = method not in (PERFUSION, "textual_inversion")
            effect = f"has its effect all the same, for {method} changes the model" if adds else "has no effect"
            found.append(f"no prompt names <{entry['name']}>: the concept {entry['name']} {effect}")
    return found


def warn_of_few_steps(recipe: Recipe, base: BaseModel) -> None:
    """Says on stderr that drawing in so few steps does not begin where noise is."""
    for words in few_steps(recipe, base):
        print(f"warning: {words}", file=sys.stderr)


def few_steps(recipe: Recipe, base: BaseModel) -> list[str]:
    """A warning where drawing in so few steps does not begin where noise is."""
    options = recipe.options
    schedule = spaced(base.model.schedule, options["spacing"])
    sampler, steps = settle(schedule, options["sampler"], options["steps"])
    first, total = float(make_plan(schedule, sampler, steps).timesteps[0]), schedule.num_train_timesteps
    if recipe.init_image or first >= 0.9 * (total - 1):
        return []
    return [
        f"{steps} steps begin at timestep {first:.0f} of {total}, where a model does not expect pure noise: models of "
        "few steps want --spacing trailing, others more steps"
    ]


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
    _, steps = settle(base.model.schedule, options["sampler"], options["steps"])
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
