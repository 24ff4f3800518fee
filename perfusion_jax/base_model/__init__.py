"""The frozen text-to-image model; the only place that knows diffusers and transformers."""

from perfusion_jax.base_model.architecture import Architecture, load_architecture, network_dtype
from perfusion_jax.base_model.model import BaseModel, load_base_model
from perfusion_jax.base_model.unet import KeysValues, KeyValue, keys_values

__all__ = [
    "Architecture",
    "BaseModel",
    "KeyValue",
    "KeysValues",
    "keys_values",
    "load_architecture",
    "load_base_model",
    "network_dtype",
]
