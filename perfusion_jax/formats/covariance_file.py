"""Files of C, the covariance of a text encoder's encodings."""

import io
from pathlib import Path
from zipfile import BadZipFile

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load

from perfusion_jax.method.covariance import checked, whitening_of
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import read_arrays, storage_errors, to_path


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
    file = to_path(file)
    array = _read_matrix(file)
    try:
        matrix = np.asarray(array, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: not a matrix of numbers ({error})") from error
    if matrix.shape != (width, width):
        raise InputError(f"{file}: of shape {matrix.shape}; this text encoder's covariance is ({width}, {width})")
    try:
        return checked(matrix)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error


def load_whitening(file: str | Path, width: int) -> jax.Array:
    """Returns C^-1/2, the metric's root, float32 [width, width]; arguments and errors as `load_covariance`."""
    return whitening_of(load_covariance(file, width))


def _read_matrix(file: epath.Path) -> np.ndarray:
    if file.suffix not in (".npz", ".npy", ".safetensors"):
        raise InputError(f"{file}: a covariance is a .npz, .npy or .safetensors file")
    with storage_errors(file, "read"):
        data = file.read_bytes()
    try:
        if file.suffix == ".npy":
            return np.load(io.BytesIO(data), allow_pickle=False)
        arrays = load(data) if file.suffix == ".safetensors" else read_arrays(data)
    except (ValueError, TypeError, EOFError, BadZipFile, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    if "covariance" in arrays:
        return arrays["covariance"]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise InputError(f"{file}: no array called 'covariance' among {sorted(arrays)}")
