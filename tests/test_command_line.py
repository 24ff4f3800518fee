"""What all command lines share."""

import subprocess
import sys

from perfusion_jax.command_line import BAD_INPUT


def test_memory_that_does_not_suffice_is_told_in_a_line():
    program = (
        "import jax.numpy as jnp; from perfusion_jax import command_line;"
        "command_line.run(lambda: jnp.zeros(2**50), memory_advice='take less')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == BAD_INPUT
    assert "Traceback" not in ended.stderr
    told = ended.stderr.splitlines()[-1]
    assert told.startswith("error: the memory of a device does not suffice (")
    assert told.endswith("): take less")
