"""A cat.

python -m perfusion_jax.train --config configs/cat.py --workdir runs/cat

On the embedded model: two minutes on two cores of an Intel Xeon; keeps step 375, with
image similarity 0.59, text similarity 0.62, prompt precision 1.00.
"""

from ml_collections import ConfigDict

from perfusion_jax.config import make_config


def get_config(base: str = "emoji") -> ConfigDict:
    """See `perfusion_jax/config.py` for the argument and all keys."""
    return make_config(base, name="cat", super_category="cat", pictures="emoji:cat")
