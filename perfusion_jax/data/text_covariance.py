"""Measures C = E[e e^T] of a text encoder by streaming a file of captions. Only real tokens count, no padding."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import Architecture, BaseModel
from perfusion_jax.method.covariance import checked
from perfusion_jax.method.surgery import Params
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import read_arrays

BATCH = 64  # captions
# Prompts are encoded at their batch's longest length, rounded up to this, so that only a few lengths are compiled.
LENGTH_STEP = 8  # tokens


class Progress(NamedTuple):
    """How far a caption file has been read, and what came of it.

    Attributes:
        total: sum of e e^T, float64 [context_width, context_width].
        tokens: encodings summed.
        captions: captions read.
        offset: bytes of the file read.
        digest: SHA-256 of those bytes, hexadecimal.
        base: name of the base model.
        text_encoder: SHA-256 of the text encoders' weights, hexadecimal.
    """

    total: np.ndarray
    tokens: int
    captions: int
    offset: int
    digest: str
    base: str
    text_encoder: str


def outer_product_sum(model: Architecture, params: dict[str, Params], ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the sum of e e^T over the masked tokens, float32 [context_width, context_width].

    Args:
        model: the architecture.
        params: the weights of its text encoders.
        ids: int32 [batch, tokens].
        mask: bool [batch, tokens].
    """
    encodings = jnp.where(mask[..., None], model.encode(params, ids).tokens.astype(jnp.float32), 0)
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
    product_sum = jax.jit(partial(outer_product_sum, base.model))
    width = base.model.context_width
    weights = {name: base.params[name] for name in base.model.text_components}
    done = start or Progress(
        np.zeros((width, width)), 0, 0, 0, hashlib.sha256().hexdigest(), base.name, weights_digest(base)
    )
    try:
        with captions.open("rb") as stream:
            digest = _prefix_digest(stream, done.offset)
            for batch in _batches(stream, digest, captions):
                ids, mask = base.model.tokenizer.captions(batch)
                # The text encoder is causal: what follows the last real token does not change the encodings before it.
                longest = -(-mask.sum(axis=1).max() // LENGTH_STEP) * LENGTH_STEP
                missing = (
                    (0, BATCH - len(batch)),
                    (0, 0),
                )  # the last batch is filled up, so that it compiles nothing new
                ids, mask = (np.pad(array[:, :longest], missing) for array in (ids, mask))
                product = product_sum(weights, ids, mask)
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


def weights_digest(base: BaseModel) -> str:
    """SHA-256 of the text encoders' weights, hexadecimal."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves([base.params[name] for name in base.model.text_components]):
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
    try:
        return checked(progress.total / progress.tokens)
    except ValueError as error:
        raise InputError(f"{captions}: {error}") from error


def partial_file(out: Path) -> Path:
    """Returns where an unfinished run keeps its progress."""
    return out.with_name(f"{out.name}.partial.npz")


def resume(out: Path, captions: Path, base: BaseModel) -> Progress | None:
    """Returns what an interrupted run left, or None if there is nothing of the same captions and model."""
    file = partial_file(out)
    if not file.is_file():
        return None
    try:
        arrays = read_arrays(file.read_bytes())
        left = Progress(arrays["total"], *(arrays[field].item() for field in Progress._fields[1:]))
        with captions.open("rb") as stream:
            same_captions = _prefix_digest(stream, left.offset).hexdigest() == left.digest
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        print(f"{file}: cannot be read ({error}); starting anew")
        return None
    if same_captions and left.text_encoder == weights_digest(base):
        print(f"{file}: going on after {left.captions:,} captions")
        return left
    print(f"{file}: made from other captions or another model; starting anew")
    return None
