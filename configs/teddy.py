"""A teddy bear.

python -m perfusion_jax.train --config configs/teddy.py --workdir runs/teddy

On the embedded model: two minutes on two cores of an Intel Xeon; keeps step 325, with
image similarity 0.60, text similarity 0.22, prompt precision 0.98.
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
