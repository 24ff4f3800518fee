"""Tensors as files of ours hold them: in safetensors, whose bytes are equal where tensors and metadata are."""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from perfusion_jax.runtime.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")
"""What an export can be written in."""


def check_dtype(dtype: str) -> None:
    """Sees that an export can be written in `dtype`.

    Raises:
        InputError: it cannot.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")


def converted(tensors: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Tensors in a dtype of DTYPES.

    Raises:
        InputError: a number does not fit into it.
    """
    check_dtype(dtype)
    with np.errstate(over="ignore"):
        result = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    check_fit(result)
    return result


def check_fit(tensors: Mapping[str, np.ndarray]) -> None:
    """Sees that converting tensors has lost no number.

    Raises:
        InputError: one is infinite or none.
    """
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise InputError(f"{name} has numbers that {tensor.dtype} cannot hold: ask for bfloat16 or float32")


def tensor_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file.

    Args:
        tensors: by name, of any dtype that safetensors knows, bfloat16 among them.
        metadata: what is not an array.
    """
    data = save({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, dict(metadata))
    # `save` writes metadata in an order of chance.
    header = read_header(data)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + data[8 + _header_size(data) :]


def read_header(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file's content: JSON after its length in 8 bytes.

    Args:
        data: what safetensors has accepted.
    """
    return json.loads(data[8 : 8 + _header_size(data)])


def _header_size(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")
