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
from perfusion_jax.runtime.files import check_writable, is_local, storage_errors, to_path, write_bytes


def main() -> None:
    """Measures the covariance of a base model's text encoder.

    Raises:
        InputError: the captions or --out cannot be used.
        UnavailableError: storage or the hub fails.
    """
    # Imported when the flags are right: JAX and diffusers take seconds.
    from perfusion_jax.base_model import load_base_model
    from perfusion_jax.data.measuring import find_or_measure, measure, own_captions

    given = flags.FLAGS
    out, captions = to_path(given.out), to_path(given.captions) if given.captions else None
    if out.suffix != ".npz":
        raise InputError(f"{out}: the result is a .npz file; name it so")
    with storage_errors(out, "read"):
        if out.exists():
            print(f"{out} is there already; delete it to make it anew")
            return
    if captions is not None:
        with storage_errors(captions, "read"):
            if captions.is_dir() or not captions.exists():
                raise InputError(f"{captions}: no such file of captions")
    check_writable(out.parent)
    base = load_base_model(given.base, revision=given.revision, variant=given.variant)
    if not is_local(out) or (captions is not None and not is_local(captions)):
        # A measurement that goes on where it was interrupted needs files on this machine.
        measured = find_or_measure(base, given.captions or "")
        write_bytes(out, measured.read_bytes())
        print(f"{out}: a copy of {measured}")
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(captions or Path(folder) / "made_up.txt")
        if captions is None:
            source.write_text(own_captions(base))
        print(measure(base, source, Path(out)))


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
