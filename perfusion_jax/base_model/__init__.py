"""The frozen text-to-image model; the only place that knows diffusers and transformers."""

from perfusion_jax.base_model.architecture import Architecture, load_architecture, network_dtype
from perfusion_jax.base_model.model import BaseModel, load_base_model
from perfusion_jax.base_model.text import Encoding
from perfusion_jax.base_model.unet import SIZES, Added, Context, keys_values, whole_sizes
from perfusion_jax.base_model.unet_blocks import KeysValues, KeyValue

__all__ = [
    "SIZES",
    "Added",
    "Architecture",
    "BaseModel",
    "Context",
    "Encoding",
    "KeyValue",
    "KeysValues",
    "keys_values",
    "load_architecture",
    "load_base_model",
    "network_dtype",
    "whole_sizes",
]
