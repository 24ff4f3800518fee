"""The uncentred covariance C = E[e e^T] of text encodings: the metric of the edit (ROME, arXiv 2202.05262, eq. 2).

    python -m perfusion_jax.covariance --base BASE --captions captions.txt --out covariance.npz

Captions stand one on a line; the paper used 100,000. Only real tokens count, no padding. C's scale cancels in the edit.
"""

import hashlib
import io
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load
from tqdm import tqdm

from perfusion_jax import command_line
from perfusion_jax.base_model import BaseModel, load_base_model
from perfusion_jax.errors import InputError
from perfusion_jax.files import replacing, storage_errors
from perfusion_jax.surgery import Params

BATCH = 64  # captions
SAVE_EVERY = 2.0  # seconds
# Prompts are encoded at their batch's longest length, rounded up to this, so that only a few lengths are compiled.
LENGTH_STEP = 8  # tokens
# The metric is used in float32: above this, similarities lose all their digits.
MAX_CONDITION = 1e6


class Progress(NamedTuple):
    """How far a caption file has been read, and what came of it.

    Attributes:
        total: sum of e e^T, float64 [context_width, context_width].
        tokens: encodings summed.
        captions: captions read.
        offset: bytes of the file read.
        digest: SHA-256 of those bytes, hexadecimal.
        base: name of the base model.
        text_encoder: SHA-256 of the text encoder's weights, hexadecimal.
    """

    total: np.ndarray
    tokens: int
    captions: int
    offset: int
    digest: str
    base: str
    text_encoder: str


def outer_product_sum(base: BaseModel, text_params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the sum of e e^T over the masked tokens, float32 [context_width, context_width].

    Args:
        base: the model's architecture.
        text_params: the text encoder's weights.
        ids: int32 [batch, tokens].
        mask: bool [batch, tokens].
    """
    encodings = jnp.where(mask[..., None], base.encode(text_params, ids).astype(jnp.float32), 0)
    return jnp.einsum("btd,bte->de", encodings, encodings, precision=jax.lax.Precision.HIGHEST)


def accumulate(base: BaseModel, captions: Path, start: Progress | None = None) -> Iterator[Progress]:
    """Streams a caption file, and yields the progress after every batch; memory does not grow with the file.

    Args:
        base: the model whose text encoder is measured.
        captions: UTF-8 text, one caption on a line; blank lines are passed over.
        start: where to go on; the numbers are the same, bit for bit, as without the interruption.

    Raises:
        InputError: the file cannot be read.
    """
    product_sum = jax.jit(partial(outer_product_sum, base))
    width = base.context_width
    done = start or Progress(
        np.zeros((width, width)), 0, 0, 0, hashlib.sha256().hexdigest(), base.name, _weights_digest(base)
    )
    try:
        with captions.open("rb") as stream:
            digest = _prefix_digest(stream, done.offset)
            for batch in _batches(stream, digest, captions):
                ids, mask = base.tokenizer.captions(batch)
                # The text encoder is causal: what follows the last real token does not change the encodings before it.
                longest = -(-mask.sum(axis=1).max() // LENGTH_STEP) * LENGTH_STEP
                missing = (
                    (0, BATCH - len(batch)),
                    (0, 0),
                )  # the last batch is filled up, so that it compiles nothing new
                ids, mask = (np.pad(array[:, :longest], missing) for array in (ids, mask))
                product = product_sum(base.params["text_encoder"], ids, mask)
                done = Progress(
                    total=done.total + np.asarray(product, np.float64),
                    tokens=done.tokens + int(mask.sum()),
                    captions=done.captions + len(batch),
                    offset=stream.tell(),
                    digest=digest.hexdigest(),
                    base=done.base,
                    text_encoder=done.text_encoder,
                )
                yield done
    except OSError as error:
        raise InputError(f"{captions}: cannot be read ({error.strerror})") from error


def _prefix_digest(stream: BinaryIO, size: int) -> Any:
    """Hashes the first `size` bytes of a file, or what there is of them, and leaves the stream behind them."""
    digest = hashlib.sha256()
    while size > 0 and (block := stream.read(min(size, 2**20))):
        digest.update(block)
        size -= len(block)
    return digest


def _weights_digest(base: BaseModel) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(base.params["text_encoder"]):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _batches(stream: BinaryIO, digest: Any, file: Path) -> Iterator[list[str]]:
    batch: list[str] = []
    while line := stream.readline():
        digest.update(line)
        try:
            caption = line.decode().strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file}: the line {line[:40]!r} is not UTF-8 ({error.reason}): convert the file"
            ) from error
        if caption:
            batch.append(caption)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def covariance_of(progress: Progress | None, captions: Path) -> np.ndarray:
    """Returns C, float64 [context_width, context_width].

    Raises:
        InputError: the captions have fewer tokens than C has dimensions, or say too little, so that it cannot be
            inverted.
    """
    if progress is None:
        raise InputError(f"{captions}: no captions in it; one goes on a line")
    dimensions = len(progress.total)
    if progress.tokens < dimensions:
        raise InputError(
            f"{captions}: {progress.tokens} tokens in {progress.captions} captions; a covariance of {dimensions} "
            "dimensions needs more than that: give more captions (the paper used 100,000)"
        )
    return _checked(progress.total / progress.tokens, captions)


def load_covariance(file: str | Path, width: int) -> np.ndarray:
    """Reads C from a file written here or elsewhere.

    Args:
        file: local or in a bucket; `.npz` or `.safetensors` with an array called `covariance` or with one array in
            all, or `.npy`.
        width: d_ctx, the width of the text encoder's output.

    Returns:
        C, float64 [width, width], symmetric and positive definite. Its scale is arbitrary.

    Raises:
        InputError: it cannot be read, is of another shape, or is no covariance that can be inverted.
        UnavailableError: storage fails.
    """
    file = epath.Path(file)
    array = _read_matrix(file)
    try:
        matrix = np.asarray(array, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: not a matrix of numbers ({error})") from error
    if matrix.shape != (width, width):
        raise InputError(f"{file}: of shape {matrix.shape}; this text encoder's covariance is ({width}, {width})")
    return _checked(matrix, file)


def _checked(matrix: np.ndarray, file: Path | epath.Path) -> np.ndarray:
    """Returns a covariance, made exactly symmetric; `file` is where it came from, for errors."""
    if not np.isfinite(matrix).all():
        raise InputError(f"{file}: has values that are not finite")
    if np.abs(matrix - matrix.T).max() > 1e-4 * np.abs(matrix).max():
        raise InputError(f"{file}: not symmetric, so not a covariance")
    matrix = (matrix + matrix.T) / 2
    eigenvalues = np.linalg.eigvalsh(matrix)
    if eigenvalues[0] <= eigenvalues[-1] / MAX_CONDITION:
        raise InputError(
            f"{file}: singular or nearly so (eigenvalues from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}): "
            "make it from more, and more varied, captions"
        )
    return matrix


def load_whitening(file: str | Path, width: int) -> jax.Array:
    """Returns C^-1/2, the metric's symmetric root, float32 [width, width]; arguments and errors as `load_covariance`.

    It whitens encodings: multiplied by it, they have the identity for their covariance.
    """
    return whitening_of(load_covariance(file, width))


def whitening_of(covariance: np.ndarray) -> jax.Array:
    """Returns C^-1/2, float32, computed in float64 from C, which is symmetric and positive definite."""
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return jnp.asarray((eigenvectors / np.sqrt(eigenvalues)) @ eigenvectors.T, jnp.float32)


def _read_matrix(file: epath.Path) -> np.ndarray:
    if file.suffix not in (".npz", ".npy", ".safetensors"):
        raise InputError(f"{file}: a covariance is a .npz, .npy or .safetensors file")
    with storage_errors(file, "read"):
        data = file.read_bytes()
    try:
        if file.suffix == ".npy":
            return np.load(io.BytesIO(data), allow_pickle=False)
        arrays = load(data) if file.suffix == ".safetensors" else _read_archive(data)
    except (ValueError, TypeError, EOFError, BadZipFile, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    if "covariance" in arrays:
        return arrays["covariance"]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise InputError(f"{file}: no array called 'covariance' among {sorted(arrays)}")


def _read_archive(data: bytes) -> dict[str, np.ndarray]:
    with io.BytesIO(data) as stream, np.load(stream, allow_pickle=False) as archive:
        return dict(archive)


def partial_file(out: Path) -> Path:
    """Returns where an unfinished run keeps its progress."""
    return out.with_name(f"{out.name}.partial.npz")


def resume(out: Path, captions: Path, base: BaseModel) -> Progress | None:
    """Returns what an interrupted run left, or None if there is nothing of the same captions and model."""
    file = partial_file(out)
    if not file.is_file():
        return None
    try:
        arrays = _read_archive(file.read_bytes())
        left = Progress(arrays["total"], *(arrays[field].item() for field in Progress._fields[1:]))
        with captions.open("rb") as stream:
            same_captions = _prefix_digest(stream, left.offset).hexdigest() == left.digest
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        print(f"{file}: cannot be read ({error}); starting anew")
        return None
    if same_captions and left.text_encoder == _weights_digest(base):
        print(f"{file}: going on after {left.captions:,} captions")
        return left
    print(f"{file}: made from other captions or another model; starting anew")
    return None


def _save(file: Path, **arrays: Any) -> None:
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


FLAGS = flags.FLAGS


def main() -> None:
    """Measures the covariance of a base model's text encoder."""
    captions, out = Path(FLAGS.captions), Path(FLAGS.out)
    if out.suffix != ".npz":
        raise InputError(f"{out}: the result is a .npz file; name it so")
    if out.is_file():
        print(f"{out} is there already; delete it to make it anew")
        return
    if not captions.is_file():
        raise InputError(f"{captions}: no such file of captions")
    base = load_base_model(FLAGS.base, revision=FLAGS.revision, variant=FLAGS.variant)
    progress = resume(out, captions, base)
    saved = time.monotonic()
    try:
        with tqdm(total=captions.stat().st_size, unit="B", unit_scale=True, desc="captions read") as bar:
            bar.update(progress.offset if progress else 0)
            for latest in accumulate(base, captions, progress):
                progress = latest
                bar.update(progress.offset - bar.n)
                if time.monotonic() - saved > SAVE_EVERY:
                    _save(partial_file(out), **progress._asdict())
                    saved = time.monotonic()
    except KeyboardInterrupt:
        if progress is not None:
            _save(partial_file(out), **progress._asdict())
        raise
    covariance = covariance_of(progress, captions)
    assert progress is not None  # covariance_of has seen to it
    _save(
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


if __name__ == "__main__":
    flags.DEFINE_string("base", None, "base model: a folder or a hub id", required=True)
    flags.DEFINE_string("captions", None, "text file with one caption on a line", required=True)
    flags.DEFINE_string("out", None, "the .npz file to write", required=True)
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
    flags.DEFINE_string("variant", None, "weight files to take, such as fp16")
    command_line.run(main, resumes=True)
