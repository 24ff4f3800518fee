"""Measures C once for each text encoder, and keeps it in the user's cache folder."""

import hashlib
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from perfusion_jax.base_model import BaseModel
from perfusion_jax.data.caption_source import make_captions
from perfusion_jax.data.text_covariance import accumulate, covariance_of, partial_file, resume, weights_digest
from perfusion_jax.runtime.errors import InputError, UnavailableError
from perfusion_jax.runtime.files import cache_folder, storage_errors, to_path, write_arrays, write_bytes

SAVE_EVERY = 2.0  # seconds
# For each dimension of C. A caption has about ten tokens, so there are a hundred encodings for each dimension, and the
# root of C is right to about 1/sqrt(100). Ten times as many are no nearer to real captions (docs/training.md, "The
# metric").
CAPTIONS_PER_DIMENSION = 10


def own_captions(base: BaseModel) -> str:
    """Captions that are made up for a model, one on a line."""
    count = CAPTIONS_PER_DIMENSION * base.model.context_width
    return "".join(f"{caption}\n" for caption in make_captions(base.model.tokenizer.whole_words, count))


def measure(base: BaseModel, captions: Path, out: Path) -> str:
    """Measures C, with a progress bar; goes on where an interrupted call for the same file was.

    Args:
        base: the model whose text encoders are measured.
        captions: UTF-8 text, one caption on a line.
        out: the `.npz` file to write.

    Returns:
        What there is to tell of it.

    Raises:
        InputError: the captions cannot be read, or say too little; or the file cannot be written.
    """
    progress = resume(out, captions, base)
    saved = time.monotonic()
    try:
        with tqdm(total=captions.stat().st_size, unit="B", unit_scale=True, desc="measuring C") as bar:
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
    return (
        f"{out}: covariance of {progress.tokens:,} tokens in {progress.captions:,} captions, "
        f"condition number {eigenvalues[-1] / eigenvalues[0]:.3g}"
    )


def find_or_measure(base: BaseModel, captions: str) -> Path:
    """Returns the file of C in the user's cache folder, measured now if it is not there.

    It belongs to the text encoders' weights and to the captions, whatever the model is called.

    Args:
        base: the model.
        captions: a file of them, local or in a bucket; empty: made-up ones.

    Raises:
        InputError: the captions cannot be read, or say too little; or there is no cache folder that can be written.
        UnavailableError: storage fails.
    """
    if captions:
        with storage_errors(captions, "read"):
            try:
                text = to_path(captions).read_bytes()
            except FileNotFoundError as error:
                raise InputError(f"{captions}: no such file of captions") from error
    else:
        text = own_captions(base).encode()
    name = hashlib.sha256(weights_digest(base).encode() + text).hexdigest()[:32]
    file = cache_folder() / "covariance" / f"{name}.npz"
    with storage_errors(file, "read"):
        found = file.is_file()
    if not found:
        kept = file.with_suffix(".txt")
        try:
            write_bytes(kept, text)
        except UnavailableError:
            raise
        except InputError as error:
            raise InputError(f"{error}; C is kept there: name another cache folder in XDG_CACHE_HOME") from error
        try:
            print(measure(base, kept, file))
        except InputError as error:
            raise InputError(str(error).replace(str(kept), captions or "the made-up captions")) from error
    return file
