"""A teddy bear.

python -m perfusion_jax.train --config configs/teddy.py --workdir runs/teddy
"""

from ml_collections import ConfigDict

from configs import default


def get_config(base: str = "emoji") -> ConfigDict:
    """See `configs/default.py` for the argument and all keys."""
    config = default.get_config(base)
    config.name = "teddy"
    config.super_category = "bear"
    config.pictures = "emoji:teddy"
    return config
