"""Measures the uncentred covariance C = E[e e^T] of a base model's text encodings: the metric of the edit.

    python -m perfusion_jax.covariance --base BASE --captions captions.txt --out covariance.npz

Captions stand one on a line; the paper used 100,000. The same command goes on where an interrupted one was.
"""

import time
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from perfusion_jax.runtime import command_line
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import write_arrays

SAVE_EVERY = 2.0  # seconds


def main() -> None:
    """Measures the covariance of a base model's text encoder."""
    # Imported when the flags are right: JAX and diffusers take seconds.
    from perfusion_jax.base_model import load_base_model
    from perfusion_jax.data.text_covariance import accumulate, covariance_of, partial_file, resume

    given = flags.FLAGS
    captions, out = Path(given.captions), Path(given.out)
    if out.suffix != ".npz":
        raise InputError(f"{out}: the result is a .npz file; name it so")
    if out.is_file():
        print(f"{out} is there already; delete it to make it anew")
        return
    if not captions.is_file():
        raise InputError(f"{captions}: no such file of captions")
    base = load_base_model(given.base, revision=given.revision, variant=given.variant)
    progress = resume(out, captions, base)
    saved = time.monotonic()
    try:
        with tqdm(total=captions.stat().st_size, unit="B", unit_scale=True, desc="captions read") as bar:
            bar.update(progress.offset if progress else 0)
            for latest in accumulate(base, captions, progress):
                progress = latest
                bar.update(progress.offset - bar.n)
                if time.monotonic() - saved > SAVE_EVERY:
                    write_arrays(partial_file(out), **progress._asdict())
                    saved = time.monotonic()
    except KeyboardInterrupt:
        if progress is not None:
            write_arrays(partial_file(out), **progress._asdict())
        raise
    covariance = covariance_of(progress, captions)
    assert progress is not None  # covariance_of has seen to it
    write_arrays(
        out,
        covariance=covariance,
        base=base.name,
        text_encoder_sha256=progress.text_encoder,
        captions_file=captions.name,
        captions_sha256=progress.digest,
        captions=progress.captions,
        tokens=progress.tokens,
    )
    partial_file(out).unlink(missing_ok=True)
    eigenvalues = np.linalg.eigvalsh(covariance)
    print(
        f"{out}: covariance of {progress.tokens:,} tokens in {progress.captions:,} captions, "
        f"condition number {eigenvalues[-1] / eigenvalues[0]:.3g}"
    )


def run() -> None:
    """The command."""
    flags.DEFINE_string("base", None, "base model: sd15, sd21, a folder, a file or a hub id", required=True)
    flags.DEFINE_string("captions", None, "text file with one caption on a line", required=True)
    flags.DEFINE_string("out", None, "the .npz file to write", required=True)
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
    flags.DEFINE_string("variant", None, "weight files to take, such as fp16")
    command_line.run(main, resumes=True)


if __name__ == "__main__":
    run()
