"""Draws pictures, of concepts or of the plain model.

    python -m perfusion_jax.sample --concept runs/dog/concepts/dog.safetensors \\
        --prompt "a photo of a <dog> on the beach" --out dog.png

A prompt names a concept by `<name>`; without `--concept` the plain model draws. Several pictures are written each to a
file of its own, and all to one grid. Every file says how it was drawn:

    python -m perfusion_jax.sample --again dog.png                  prints it
    python -m perfusion_jax.sample --again dog.png --out copy.png   draws it again
"""

import json

from absl import flags

from perfusion_jax.runtime import command_line
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import check_writable, to_path
from perfusion_jax.runtime.names import SAMPLERS, SPACINGS


def main() -> None:
    """Draws --prompt and writes --out, or tells how --again was drawn.

    Raises:
        InputError: the flags do not go together, or what they name cannot be used or replaced.
        UnavailableError: storage or the hub fails.
    """
    # Imported when the flags are right: JAX and diffusers take seconds.
    from perfusion_jax.base_model import load_base_model, network_dtype
    from perfusion_jax.drawing.arguments import FLAGS, recipe_of_flags, recipe_of_picture, warn
    from perfusion_jax.drawing.attention_sheets import write_attention
    from perfusion_jax.drawing.recipe import OPTIONS, few_steps, unnamed
    from perfusion_jax.drawing.rendering import check_replaced, draw, files_of, write

    arguments = flags.FLAGS
    if arguments.again:
        idle = [f"--{name}" for name in (*FLAGS, *OPTIONS) if arguments[name].present]
        if idle:
            raise InputError(
                f"--again draws as the picture says, without {', '.join(idle)}: leave that out, or --again"
            )
        recipe = recipe_of_picture(arguments.again, bool(arguments["base"].present), arguments.base)
        print(json.dumps(recipe._asdict(), indent=2, ensure_ascii=False))
        if not arguments.out:
            return
    else:
        recipe = recipe_of_flags(arguments)
    if not arguments.out:
        raise InputError("give --out, the .png file to write")
    out = to_path(arguments.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: pictures are written as .png; name it so")
    check_writable(out.parent)
    check_replaced(files_of(recipe, out))
    folder = to_path(arguments.attention) if arguments.attention else None
    if folder:
        if recipe.sweep:
            raise InputError("--attention shows the pictures of one setting: leave out --sweep")
        check_writable(folder)
        check_replaced([folder / f"{number}.png" for number in range(len(recipe.prompts))])
    warn(unnamed(recipe))
    base = load_base_model(dtype=network_dtype(), **recipe.base)  # type: ignore[arg-type]
    warn(few_steps(recipe, base))
    drawn = draw(recipe, base, attention=folder is not None)
    write(recipe, drawn, out)
    if folder:
        write_attention(recipe, drawn[0], base.model.tokenizer, folder)
    print(out)


def run() -> None:
    """The command."""
    flags.DEFINE_multi_string("concept", [], "concept file, or NAME=FILE to call it <NAME>; may be given several times")
    flags.DEFINE_string("tree", None, "folder of an exported Orbax tree: draw with its kernels and its concepts")
    flags.DEFINE_string("prompt", None, "what to draw; concepts by <name>")
    flags.DEFINE_string("prompts", None, "file of prompts, one on a line, in place of --prompt")
    flags.DEFINE_string(
        "out", None, "the .png file to write; of several pictures it is the grid, and each is beside it, as NAME_0.png"
    )
    flags.DEFINE_string("again", None, "tell how this picture was drawn; with --out, draw it again")
    flags.DEFINE_string("base", "emoji", "base model: emoji, sd15, sd21, sdxl, a folder, a file or a hub id")
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
    flags.DEFINE_string("variant", None, "weight files to take, such as fp16")
    flags.DEFINE_integer("num_images", 4, "pictures of each prompt", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the first picture; the next has the next", lower_bound=0, upper_bound=2**31)
    flags.DEFINE_integer("batch_size", 8, "pictures drawn at once", lower_bound=1)
    flags.DEFINE_enum(
        "sampler",
        None,
        SAMPLERS,
        "how noise is taken away; as the base model's scheduler says if left out",
    )
    flags.DEFINE_integer("steps", None, "sampling steps; ddim 50, dpm++ 20, the others 30 if left out", lower_bound=1)
    flags.DEFINE_enum(
        "spacing",
        None,
        SPACINGS,
        "which timesteps these are; as the base model's scheduler says if left out",
    )
    flags.DEFINE_float(
        "guidance", None, "guidance scale, 1 or less for none; the concept's own, or 6, if left out", lower_bound=0
    )
    flags.DEFINE_float("guidance_rescale", 0.0, "share of its contrast to take back", lower_bound=0, upper_bound=1)
    flags.DEFINE_string("negative_prompt", None, "what guidance leads away from")
    flags.DEFINE_list("bias", [], "beta of the gate, one or one per concept; the concept's own if left out")
    flags.DEFINE_list("temperature", [], "tau of the gate, likewise")
    flags.DEFINE_list("strength", [], "strength of the concept, likewise; 1 if left out")
    flags.DEFINE_list("start", [], "fraction of the steps from which the concept acts, likewise; 0 if left out")
    flags.DEFINE_list("end", [], "fraction of the steps up to which it acts, likewise; 1 if left out")
    flags.DEFINE_enum("lock", "local", ["local", "global"], "global: all keys from the super-category's prompt")
    flags.DEFINE_integer("height", None, "in pixels; the model's own if left out")
    flags.DEFINE_integer("width", None, "in pixels; the model's own if left out")
    flags.DEFINE_string("init_image", None, "picture to start from in place of noise")
    flags.DEFINE_float("init_strength", 0.8, "how much of it is drawn anew, above 0, at most 1")
    flags.DEFINE_string("sweep", None, "grid over a control, such as bias=0.4:0.8:5")
    flags.DEFINE_string("attention", None, "folder for maps of where each word of the prompt went")
    command_line.run(main)


if __name__ == "__main__":
    run()
