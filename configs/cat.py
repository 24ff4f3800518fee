"""A cat.

python -m perfusion_jax.train --config configs/cat.py --workdir runs/cat
"""

from ml_collections import ConfigDict

from configs import default


def get_config(base: str = "emoji") -> ConfigDict:
    """See `configs/default.py` for the argument and all keys."""
    config = default.get_config(base)
    config.name = "cat"
    config.super_category = "cat"
    config.pictures = "emoji:cat"
    return config
