"""A jeep.

python -m perfusion_jax.train --config configs/jeep.py --workdir runs/jeep

On the embedded model: two minutes on two cores of an Intel Xeon; keeps step 200, with
image similarity 0.50, text similarity 0.16, prompt precision 0.92.
Wheels and windows stay unclear.
"""

from ml_collections import ConfigDict

from perfusion_jax.config import make_config


def get_config(base: str = "emoji") -> ConfigDict:
    """See `perfusion_jax/config.py` for the argument and all keys."""
    return make_config(base, name="jeep", super_category="car", pictures="emoji:jeep")
