"""Writes concepts as other tools read them.

    python -m perfusion_jax.export --concept runs/dog/concepts/dog.safetensors --to lora --out exports/dog

KIND is `lora` (a LoRA and an embedding: diffusers, A1111, Forge, SD.Next, ComfyUI, kohya, OneTrainer), `lora-peft`
(diffusers alone), `bundle` (both in one file: A1111, SD.Next), `embedding` (the word alone), `pipeline` (a whole model
in the diffusers layout) or `orbax` (the UNet's parameter tree for JAX, baked or --gated). Several concepts are baked
together. The README.md beside the files says which words to write in which tool.
"""

from functools import partial
from pathlib import Path

from absl import flags

from perfusion_jax.runtime import command_line
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import at_home, is_local
from perfusion_jax.runtime.names import CONCEPT_EXPORTS, MODEL_EXPORTS


def main() -> None:
    """Writes --concept as --to says."""
    # Imported when the flags are right: JAX and diffusers take seconds.
    from perfusion_jax.base_model import load_base_model
    from perfusion_jax.drawing.examples import draw_examples
    from perfusion_jax.formats.concept_file import load_concept
    from perfusion_jax.formats.exporting import export, fitted_strengths
    from perfusion_jax.formats.hub import push

    given = flags.FLAGS
    try:
        strengths = [float(strength) for strength in given.strength]
    except ValueError as error:
        raise InputError(f"--strength={','.join(given.strength)}: not numbers") from error
    if strengths and given.fit_scale:
        raise InputError("--strength and --fit_scale: give one of them")
    if given.push_to_hub and not is_local(given.out):
        raise InputError(f"--out={given.out}: what is pushed to the hub is read from a folder on this machine")
    needs_all = given.fit_scale or given.examples > 0 or given.to in MODEL_EXPORTS
    base = load_base_model(given.base, revision=given.revision, variant=given.variant, edited_only=not needs_all)
    concepts = [load_concept(file, base) for file in given.concept]
    if given.fit_scale:
        strengths = fitted_strengths(base, concepts)
    edit = "none" if given.to == "embedding" else "gated" if given.gated else "baked"
    draw = partial(draw_examples, base, concepts, strengths, edit, given.examples)
    written = export(base, concepts, given.to, given.out, strengths, given.dtype, given.gated, draw)
    print(*written, sep="\n")
    if given.push_to_hub:
        files = [f"{entry.name}/*" if entry.is_dir() else entry.name for entry in written]
        print(push(Path(at_home(given.out)), files, given.push_to_hub, given.public))


def run() -> None:
    """The command."""
    flags.DEFINE_multi_string("concept", None, "concept file; may be given several times", required=True)
    flags.DEFINE_enum("to", None, [*CONCEPT_EXPORTS, *MODEL_EXPORTS], "what to write", required=True)
    flags.DEFINE_string("out", None, "the folder to write", required=True)
    flags.DEFINE_string("push_to_hub", None, "also upload it to this repository of the Hugging Face hub, owner/name")
    flags.DEFINE_bool("public", False, "anybody may see what is uploaded; otherwise you alone")
    flags.DEFINE_string("base", "emoji", "base model: emoji, sd15, sd21, sdxl, a folder, a file or a hub id")
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
    flags.DEFINE_string("variant", None, "weight files to take, such as fp16")
    flags.DEFINE_list("strength", [], "strength of the concept, one or one per concept; 1 if left out")
    flags.DEFINE_bool("fit_scale", False, "choose the strengths at which the baked edit is nearest to the gated one")
    flags.DEFINE_integer("examples", 0, "pictures to draw for the model card", lower_bound=0)
    flags.DEFINE_bool("gated", False, "of orbax: keep the gated edit beside the frozen kernels, instead of baking it")
    flags.DEFINE_enum("dtype", "float16", ["float32", "bfloat16", "float16"], "of the numbers that are written")
    command_line.run(main)


if __name__ == "__main__":
    run()
