"""How a file of pictures was drawn: all that it depends on, as plain JSON that is kept in the file itself."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from perfusion_jax.base_model import BaseModel
from perfusion_jax.drawing.prompts import escaped, without_syntax
from perfusion_jax.drawing.samplers import make_plan, sampler_and_steps, spaced
from perfusion_jax.formats.concept_file import PERFUSION, read_card, read_file
from perfusion_jax.formats.picture_file import load_recipe
from perfusion_jax.runtime.errors import InputError

FORMAT = "perfusion_jax picture 1"
LIBRARIES = ("perfusion_jax", "jax", "flax", "diffusers")
CONTROLS = ("bias", "temperature", "strength", "start", "end")
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
        prompts: what other programs read in them is taken out (`prompts.foreign` tells of it).
        count: pictures of each prompt.
        seed: of the first; the next has the next.
        options: all of OPTIONS.
    """
    prompts, options = [without_syntax(prompt)[0] for prompt in prompts], dict(options)
    if options["negative_prompt"] is not None:
        options["negative_prompt"] = without_syntax(options["negative_prompt"])[0]
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


def sweep_over(name: str, first: float, last: float, count: int) -> tuple[str, list[float]]:
    """A control, and `count` values of it from the first to the last.

    Raises:
        InputError: it is none that is swept, or there is no value.
    """
    if name not in (*CONTROLS, "guidance") or count < 1:
        raise InputError(f"{name}: sweeps one of {', '.join(CONTROLS)}, guidance over at least one value")
    return name, np.linspace(first, last, count).round(6).tolist()


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


def few_steps(recipe: Recipe, base: BaseModel) -> list[str]:
    """A warning where drawing in so few steps does not begin where noise is."""
    options = recipe.options
    schedule = spaced(base.model.schedule, options["spacing"])
    sampler, steps = sampler_and_steps(schedule, options["sampler"], options["steps"])
    first, total = float(make_plan(schedule, sampler, steps).timesteps[0]), schedule.num_train_timesteps
    if recipe.init_image or first >= 0.9 * (total - 1):
        return []
    return [
        f"{steps} steps begin at timestep {first:.0f} of {total}, where a model does not expect pure noise: models of "
        "few steps want --spacing trailing, others more steps"
    ]


def digest_of(file: str) -> str:
    """SHA-256 of a concept's file, in hexadecimal.

    Raises:
        InputError, UnavailableError: it cannot be read.
    """
    return hashlib.sha256(read_file(file)).hexdigest()
