"""A dog.

python -m perfusion_jax.train --config configs/dog.py --workdir runs/dog

On the embedded model: two minutes on two cores of an Intel Xeon; keeps step 375, with
image similarity 0.61, text similarity 0.50, prompt precision 0.97.
"""

from ml_collections import ConfigDict

from perfusion_jax.config import make_config


def get_config(base: str = "emoji") -> ConfigDict:
    """See `perfusion_jax/config.py` for the argument and all keys."""
    return make_config(base, name="dog", super_category="dog", pictures="emoji:dog")
