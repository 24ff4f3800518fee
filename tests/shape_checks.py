"""Checks, while tests run, that arrays have the dtypes and shapes that the pure modules' signatures give.

`addopts` in pyproject.toml names the modules (`--jaxtyping-packages`).
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arguments and the result of a function; not of constructors, for JAX puts all sorts into pytrees."""
    return function if function.__name__ == "__init__" else beartype(function)
