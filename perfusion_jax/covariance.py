"""Measures the uncentred covariance C = E[e e^T] of a base model's text encodings: the metric of the edit.

    python -m perfusion_jax.covariance --base BASE --out covariance.npz [--captions captions.txt]

Training measures it by itself where it is missing, and keeps it in the cache folder. Captions stand one on a line; the
paper used 100,000; without them, captions are made up. The same command goes on where an interrupted one was.
"""

import tempfile
from pathlib import Path

from absl import flags

from perfusion_jax.runtime import command_line
from perfusion_jax.runtime.errors import InputError


def main() -> None:
    """Measures the covariance of a base model's text encoder."""
    # Imported when the flags are right: JAX and diffusers take seconds.
    from perfusion_jax.base_model import load_base_model
    from perfusion_jax.data.measuring import measure, own_captions

    given = flags.FLAGS
    out = Path(given.out)
    if out.suffix != ".npz":
        raise InputError(f"{out}: the result is a .npz file; name it so")
    if out.is_file():
        print(f"{out} is there already; delete it to make it anew")
        return
    if given.captions and not Path(given.captions).is_file():
        raise InputError(f"{given.captions}: no such file of captions")
    base = load_base_model(given.base, revision=given.revision, variant=given.variant)
    with tempfile.TemporaryDirectory() as folder:
        captions = Path(given.captions) if given.captions else Path(folder) / "made_up.txt"
        if not given.captions:
            captions.write_text(own_captions(base))
        print(measure(base, captions, out))


def run() -> None:
    """The command."""
    flags.DEFINE_string("base", None, "base model: sd15, sd21, sdxl, a folder, a file or a hub id", required=True)
    flags.DEFINE_string("captions", None, "text file with one caption on a line; made-up ones if left out")
    flags.DEFINE_string("out", None, "the .npz file to write", required=True)
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
    flags.DEFINE_string("variant", None, "weight files to take, such as fp16")
    command_line.run(main, resumes=True)


if __name__ == "__main__":
    run()
