"""Safetensors as bytes: equal tensors and equal metadata are equal files."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save


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
