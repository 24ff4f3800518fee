"""Compiles a fleet's step for a TPU that is not there, and tells what it would take.

    python -m perfusion_jax.compile --config configs/fleet.py:sd15 --topology v5e:16x16 [--json]

Neither a TPU nor weights are needed: the base model's configs and tokenizer are enough (`--config.base=FOLDER`), and
`pip install -e '.[tpu]'` brings the compiler. `--config.members=0` takes one concept for each place along the
mesh's axis `concept`.
"""

import json

from absl import flags
from ml_collections import config_flags

from perfusion_jax.config import settle
from perfusion_jax.runtime import command_line


def main() -> None:
    """Compiles by the flags, and prints."""
    # Imported when the flags are right: JAX and diffusers take seconds.
    import jax

    from perfusion_jax.learning.forecast import describe, text

    jax.config.update("jax_platforms", "cpu")
    given = flags.FLAGS
    config = settle(given.config, config_flags.get_override_values(given["config"]))
    step = describe(config, given.topology)
    print(json.dumps(step, indent=2) if flags.FLAGS.json else text(step))


def run() -> None:
    """The command."""
    config_flags.DEFINE_config_file("config", None, "a config of a fleet, such as configs/fleet.py:sd15")
    flags.DEFINE_string("topology", None, "the TPUs, such as v5e:2x4 or v5e:16x16")
    flags.DEFINE_bool("json", False, "print JSON")
    flags.mark_flags_as_required(["config", "topology"])
    command_line.run(main)


if __name__ == "__main__":
    run()
