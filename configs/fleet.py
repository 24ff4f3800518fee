"""Many concepts: by default the eight that ship with the package.

python -m perfusion_jax.train --config configs/fleet.py --workdir runs/fleet
python -m perfusion_jax.train --config configs/fleet.py --config.concepts=concepts.csv --workdir runs/mine
"""

from ml_collections import ConfigDict

from configs import default


def get_config(base: str = "emoji") -> ConfigDict:
    """See `configs/default.py` for the argument and all other keys."""
    config = default.get_config(base)
    # A .csv or .jsonl table, or a folder of concept folders, local or gs://; emoji: the examples that ship. The table
    # gives name, super_category and pictures of each (perfusion_jax/data/table.py), and it may override, by columns of
    # these names:
    #   licence, crop, flip, seed, steps
    #   size, batch_size, accumulation, values_rate, embedding_rate, bias, temperature, target_input_decay
    # Concepts that agree in the second line are learnt together, others in rounds of their own.
    config.concepts = "emoji"
    for key in ("name", "super_category", "pictures"):
        del config[key]
    # Concepts at once. 0: rounds as equal as can be, of at most as many as fit the chips' memory by the compiler's
    # report; where the device does not tell its memory, as a CPU, of at most 8 for each place along the mesh's axis
    # `concept`.
    config.members = 0
    # Devices along concept, data (samples of one concept's batch) and fsdp (likewise, and the frozen weights); one of
    # them may be -1. Nothing is sent along concept: keep the others at 1 unless one concept does not fit on a chip.
    config.mesh = (-1, 1, 1)
    # A fleet keeps the last step of each concept, and looks at it once: when it is finished.
    config.validate_every = 0
    return config
