"""Perfusion: key-locked rank-one editing for text-to-image personalization (arXiv 2305.01644), in JAX for TPUs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# What the package offers, by the module that has it. Imported when it is first asked for (PEP 562): JAX takes a second
# to import and diffusers several, and a command should say what is wrong with its flags at once.
_OFFERED = {
    "BaseModel": "base_model",
    "Concept": "method.concept",
    "Gate": "method.edit",
    "InputError": "runtime.errors",
    "bake": "method.surgery",
    "generate": "drawing.generation",
    "insert": "method.surgery",
    "keys_values": "base_model",
    "load_base_model": "base_model",
    "load_concept": "formats.concept_file",
    "load_whitening": "formats.covariance_file",
    "remove": "method.surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_OFFERED[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
