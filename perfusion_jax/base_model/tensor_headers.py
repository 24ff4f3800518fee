"""What the header of a safetensors file says, from which all but the weights can be known."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from perfusion_jax.base_model.weights import opened_safetensors
from perfusion_jax.runtime.errors import InputError


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor: its shape, and its dtype as safetensors names it, such as `F16`."""

    shape: tuple[int, ...]
    dtype: str


class Part(NamedTuple):
    """The tensors of one component.

    Attributes:
        where: what to call it in errors: the file and the component.
        tensors: by name, without what the names of the component begin with.
    """

    where: str
    tensors: Mapping[str, TensorInfo]

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Returns a tensor's shape.

        Raises:
            InputError: there is no such tensor, or it has another number of axes.
        """
        if name not in self.tensors:
            raise InputError(f"{self.where}: {name} is missing: the file is not complete, or of another kind of model")
        shape = self.tensors[name].shape
        if len(shape) != rank:
            raise InputError(f"{self.where}: {name} has shape {shape}, where {rank} axes are expected")
        return shape

    def count(self, pattern: str) -> int:
        """Returns how many there are of what is numbered from 0 by the only group of a pattern at a name's start."""
        matches = (re.match(pattern, name) for name in self.tensors)
        return max((int(match[1]) for match in matches if match), default=-1) + 1


class Header(NamedTuple):
    """The header of a safetensors file.

    Attributes:
        file: where it is.
        tensors: by name.
        metadata: whatever the program that wrote it had to say.
    """

    file: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def has(self, prefix: str) -> bool:
        """Whether the name of a tensor begins so."""
        return any(name.startswith(prefix) for name in self.tensors)


def read_header(file: Path) -> Header:
    """Reads the header of a safetensors file.

    Raises:
        InputError: there is no such file, or it is broken.
        UnavailableError: storage fails.
    """
    with opened_safetensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        tensors = {name: TensorInfo(tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
        return Header(file, tensors, opened.metadata() or {})
