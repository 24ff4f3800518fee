"""What the command line says of a drawing."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from absl import flags

from perfusion_jax.drawing.prompts import foreign
from perfusion_jax.drawing.recipe import CONTROLS, OPTIONS, Recipe, digest_of, make_recipe, read_recipe, sweep_over
from perfusion_jax.formats.concept_file import read_card
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import is_local, storage_errors, to_path

FLAGS = ("concept", "tree", "prompt", "prompts", "num_images", "seed", "init_image", "sweep")
"""What a recipe is made of beside the options and the base model, as flags."""


def recipe_of_flags(arguments: flags.FlagValues) -> Recipe:
    """What the command line asks for; warns of what other programs would read in its prompts.

    Raises:
        InputError: a flag's value is not of its kind.
    """
    options = {name: getattr(arguments, name) for name in OPTIONS}
    options |= {name: numbers(name, options[name]) for name in CONTROLS}
    prompts = read_prompts(arguments.prompt, arguments.prompts)
    warn([*foreign(prompts), *foreign([options["negative_prompt"] or ""])])
    return make_recipe(
        {"source": arguments.base, "revision": arguments.revision, "variant": arguments.variant},
        read_concepts(arguments.concept),
        prompts,
        arguments.num_images,
        arguments.seed,
        options,
        init_image=arguments.init_image,
        sweep=parse_sweep(arguments.sweep),
        tree=arguments.tree,
    )


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
        if digest_of(entry["file"]) != entry["sha256"]:
            raise InputError(f"{entry['file']}: the concept has changed since {file} was drawn")
    for library, then in recipe.versions.items():
        if version(library) != then:
            warn([f"drawn with {library} {then}; this is {version(library)}"])
    return recipe


def warn(warnings: Sequence[str]) -> None:
    """Says them on stderr."""
    for words in warnings:
        print(f"warning: {words}", file=sys.stderr)


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
        entry = {"name": name or read_card(file).name, "file": file, "sha256": digest_of(file)}
        if entry not in found:
            found.append(entry)
    return found


def _names_a_file(word: str) -> bool:
    """Whether a word is NAME=FILE; a folder, a bucket or a file may have = in its name, too."""
    name, sign, _ = word.partition("=")
    return bool(sign) and "/" not in name and not (is_local(word) and to_path(word).exists())


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
