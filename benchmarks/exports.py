"""Sizes and seconds of exports, each by its command in a process of its own.

    python benchmarks/exports.py                        the embedded model
    python benchmarks/exports.py --sd15                 Stable Diffusion 1.5 of random weights
    python benchmarks/exports.py --base FOLDER --kinds lora
    python benchmarks/exports.py --python user/bin/python

The last runs the commands in another environment, such as one that holds no PyTorch: diffusers imports it where it is.
Seconds are of the whole command, with Python's start and the loading of the base model. The concept is its
super-category still: neither sizes nor seconds depend on what it has learnt. `--sd15` needs 8 GB of
disk.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from checkpoints import save_full_size
from side_by_side import processor

from perfusion_jax import load_base_model
from perfusion_jax.formats.concept_file import ConceptCard, save_concept
from perfusion_jax.formats.exporting import KINDS

MEGABYTE = 1e6


def write_concept(file: Path, base_name: str) -> None:
    """A concept of a base model that no step has changed."""
    base = load_base_model(base_name)
    concept = base.new_concept("dog", jnp.eye(base.model.context_width))
    save_concept(file, concept, ConceptCard("rex", "dog", base.name, base.fingerprint, 0.6, 0.15, 6.0, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="emoji", help="base model, as of the command")
    parser.add_argument("--sd15", action="store_true", help="the full Stable Diffusion 1.5 instead")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the commands")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of exports")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = str(save_full_size(folder / "sd15")) if options.sd15 else options.base
        write_concept(folder / "rex.safetensors", base)
        print(f"{processor()}; {'Stable Diffusion 1.5' if options.sd15 else base}; in float16\n")
        print("| `--to` | MB | s |")
        print("| --- | --- | --- |")
        for kind in options.kinds:
            out = folder / kind
            command = [options.python, "-m", "perfusion_jax.export", f"--base={base}", f"--to={kind}", f"--out={out}"]
            command.append(f"--concept={folder / 'rex.safetensors'}")
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=folder)
            seconds = time.perf_counter() - start
            size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
            print(f"| `{kind}` | {size / MEGABYTE:.3g} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
