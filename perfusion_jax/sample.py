"""Draws pictures, of concepts or of the plain model.

    python -m perfusion_jax.sample --concept runs/dog/concepts/dog.safetensors \\
        --prompt "a photo of <dog> on the beach" --out dog.png

A prompt names a concept by `<name>`; without `--concept` the plain model draws. Several pictures make one grid.
"""

import math
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from perfusion_jax import command_line
from perfusion_jax.base_model import load_base_model, network_dtype
from perfusion_jax.edit import Gate
from perfusion_jax.errors import InputError
from perfusion_jax.files import replacing
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.grids import grid
from perfusion_jax.sampling import generate


def per_concept(name: str, given: list[str], defaults: list[float]) -> list[float]:
    """Values of a gate's control: those given, one for all concepts or one for each, or else the concepts' own.

    Raises:
        InputError: not numbers, or another number of them.
    """
    try:
        values = [float(value) for value in given]
    except ValueError as error:
        raise InputError(f"--{name}={','.join(given)}: not numbers") from error
    if not all(map(math.isfinite, values)) or (name == "temperature" and min(values, default=1) <= 0):
        raise InputError(f"--{name}={','.join(given)}: must be finite{', and above 0' * (name == 'temperature')}")
    if not values:
        return defaults
    if len(values) not in (1, len(defaults)):
        raise InputError(
            f"--{name} has {len(values)} values: give one, or one for each of the {len(defaults)} concepts"
        )
    return values * len(defaults) if len(values) == 1 else values


def main() -> None:
    """Draws --prompt and writes --out."""
    arguments = flags.FLAGS
    out = Path(arguments.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: pictures are written as .png; name it so")
    base = load_base_model(
        arguments.base, dtype=network_dtype(), revision=arguments.revision, variant=arguments.variant
    )
    loaded = [load_concept(file, base) for file in arguments.concept]
    cards = [card for _, card in loaded]
    bias = per_concept("bias", arguments.bias, [card.bias for card in cards])
    temperature = per_concept("temperature", arguments.temperature, [card.temperature for card in cards])
    strength = per_concept("strength", arguments.strength, [1.0] * len(cards))
    names = [card.placeholder for card in cards]
    if len(set(names)) < len(names):
        raise InputError(
            f"two concepts are called {max(names, key=names.count)}: give each a name of its own, or one once"
        )
    for card in cards:
        if card.placeholder not in arguments.prompt:
            print(f"warning: the prompt does not name {card.placeholder}")
    pictures = generate(
        base,
        [arguments.prompt] * arguments.num_images,
        range(arguments.seed, arguments.seed + arguments.num_images),
        concepts={card.placeholder: concept for concept, card in loaded},
        gates=[Gate(*values) for values in zip(bias, temperature, strength, strict=True)] if cards else None,
        steps=arguments.steps,
        guidance_scale=arguments.guidance,
        height=arguments.height,
        width=arguments.width,
        batch_size=min(arguments.num_images, 8),
    )
    columns = int(np.ceil(np.sqrt(len(pictures))))
    sheet = grid([pictures[start : start + columns] for start in range(0, len(pictures), columns)])
    with replacing(out) as temporary:
        Image.fromarray(pictures[0] if len(pictures) == 1 else sheet).save(temporary, "png")
    print(out)


if __name__ == "__main__":
    flags.DEFINE_multi_string("concept", [], "concept file; may be given several times")
    flags.DEFINE_string("prompt", None, "what to draw; concepts by <name>", required=True)
    flags.DEFINE_string("out", None, "the .png file to write", required=True)
    flags.DEFINE_string("base", "emoji", "base model: emoji, a folder or a hub id")
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
    flags.DEFINE_string("variant", None, "weight files to take, such as fp16")
    flags.DEFINE_integer("num_images", 4, "how many pictures", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the first picture; the next has the next", lower_bound=0, upper_bound=2**31)
    flags.DEFINE_integer("steps", 50, "DDIM steps", lower_bound=1)
    flags.DEFINE_float("guidance", 6.0, "guidance scale; 1 for none")
    flags.DEFINE_list("bias", [], "beta of the gate, one or one per concept; the concept's own if left out")
    flags.DEFINE_list("temperature", [], "tau of the gate, likewise")
    flags.DEFINE_list("strength", [], "strength of the edit, likewise; 1 if left out")
    flags.DEFINE_integer("height", None, "in pixels; the model's own if left out")
    flags.DEFINE_integer("width", None, "in pixels; the model's own if left out")
    command_line.run(main)
