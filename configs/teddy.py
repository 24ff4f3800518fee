"""A teddy bear.

python -m perfusion_jax.train --config configs/teddy.py --workdir runs/teddy

On the embedded model: two minutes on two cores of an Intel Xeon; keeps step 325, with
image similarity 0.60, text similarity 0.22, prompt precision 0.98.
"""

from ml_collections import ConfigDict

from perfusion_jax.config import make_config


def get_config(base: str = "emoji") -> ConfigDict:
    """See `perfusion_jax/config.py` for the argument and all keys."""
    return make_config(base, name="teddy", super_category="bear", pictures="emoji:teddy")
