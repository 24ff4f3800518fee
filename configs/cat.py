"""A cat.

python -m perfusion_jax.train --config configs/cat.py --workdir runs/cat

On the embedded model: two minutes on two cores of an Intel Xeon; keeps step 375, with
image similarity 0.59, text similarity 0.62, prompt precision 1.00.
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
