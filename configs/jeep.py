"""A jeep.

python -m perfusion_jax.train --config configs/jeep.py --workdir runs/jeep

On the embedded model: two minutes on two cores of an Intel Xeon; keeps step 200, with
image similarity 0.50, text similarity 0.16, prompt precision 0.92.
Wheels and windows stay unclear.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(base: str = "emoji") -> ConfigDict:
    """See `configs/default.py` for the argument and all keys."""
    config = default.get_config(base)
    config.name = "jeep"
    config.super_category = "car"
    config.pictures = "emoji:jeep"
    return config
