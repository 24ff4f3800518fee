"""Many concepts: by default the eight that ship with the package.

python -m perfusion_jax.train --config configs/fleet.py --workdir runs/fleet
python -m perfusion_jax.train --config configs/fleet.py --config.concepts=concepts.csv --workdir runs/mine
"""

from ml_collections import ConfigDict

from perfusion_jax.config import make_config


def get_config(base: str = "emoji") -> ConfigDict:
    """See `perfusion_jax/config.py` for the argument and all keys."""
    return make_config(base, concepts="emoji", validate_every=0)
