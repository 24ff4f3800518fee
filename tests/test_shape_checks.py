"""The shapes in signatures are checked in these tests (shape_checks.py)."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from perfusion_jax.drawing.denoising import to_pixels
from perfusion_jax.method.edit import dual


def test_widths_that_differ_are_refused():
    with pytest.raises(TypeCheckError, match="target_input"):
        dual(jnp.zeros((3, 3)), jnp.zeros(4))


def test_other_dtypes_are_refused():
    with pytest.raises(TypeCheckError, match="images"):
        to_pixels(jnp.zeros((2, 2, 3), jnp.int32))
