"""Perfusion: key-locked rank-one editing for text-to-image personalization (arXiv 2305.01644), in JAX for TPUs."""

from perfusion_jax.base_model import BaseModel, keys_values, load_base_model
from perfusion_jax.drawing.generation import generate
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.formats.covariance_file import load_whitening
from perfusion_jax.method.concept import Concept
from perfusion_jax.method.edit import Gate
from perfusion_jax.method.surgery import bake, insert, remove
from perfusion_jax.runtime.errors import InputError

__version__ = "0.1.0.dev0"

__all__ = [
    "BaseModel",
    "Concept",
    "Gate",
    "InputError",
    "bake",
    "generate",
    "insert",
    "keys_values",
    "load_base_model",
    "load_concept",
    "load_whitening",
    "remove",
]
