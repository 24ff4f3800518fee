"""Learns a concept, or a table of them if the config names one.

    python -m perfusion_jax.train --config configs/dog.py --workdir runs/dog [--config.KEY=VALUE ...]
    python -m perfusion_jax.train --config configs/fleet.py --workdir runs/fleet [--config.concepts=TABLE]
    python -m perfusion_jax.train --workdir runs/rex --config.name=rex --config.super_category=dog \\
        --config.pictures=photos/

The same command goes on where an interrupted one was. `--config configs/dog.py:sd15` learns it on Stable Diffusion 1.5.
"""

import os
import re
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from perfusion_jax import config as default_config
from perfusion_jax.config import MEMORY_ADVICE, is_fleet, settle
from perfusion_jax.runtime import command_line
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import to_path


def parse_profile(text: str | None) -> tuple[int, int] | None:
    """Reads `START:STOP`: the steps of this run, from 0, that are traced; None where none are.

    Raises:
        InputError: it is not of that form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(f"--profile is {text!r}; it must be START:STOP, two numbers of steps, such as 10:15")
    return int(match[1]), int(match[2])


def tell_result(config: ConfigDict, result: epath.Path) -> None:
    """Prints what was learnt, and the command that draws it."""
    from perfusion_jax.formats.concept_file import read_card

    card = read_card(result)
    print(f"{result}: {result.stat().length / 1000:.0f} KB, from step {card.step}")
    arguments = {
        "concept": str(result),
        "prompt": f"a photo of a {card.phrase} on the beach",
        "out": f"{config.name}.png",
        "base": "" if config.base == "emoji" else config.base,
        "revision": config.revision,
        "variant": config.variant,
        "height": config.size or "",
        "width": config.size or "",
    }
    words = [word for name, value in arguments.items() if value != "" for word in (f"--{name}", str(value))]
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    print(f"draw it:  {shlex.quote(str(python))} -m perfusion_jax.sample {shlex.join(words)}")


def main() -> None:
    """Learns the concept of --config in --workdir, or the concepts if it names a table of them.

    Raises:
        InputError: --shard or --distributed is given for one concept, or as for `train_one` and `train_fleet`.
    """
    # Imported when the flags are right: JAX and diffusers take seconds.
    import jax

    from perfusion_jax.learning.diagnostics import Diagnostics
    from perfusion_jax.learning.runs import Session, train_fleet, train_one
    from perfusion_jax.learning.workdir import COMPILED
    from perfusion_jax.pod import distributed

    given = flags.FLAGS
    config = settle(given.config, config_flags.get_override_values(given["config"]))
    workdir = to_path(given.workdir)
    session = Session(Diagnostics(parse_profile(given.profile), given.debug_nans))
    if not is_fleet(config):
        if given.shard or given.distributed:
            raise InputError("--shard and --distributed are for fleets: config.concepts names none")
        tell_result(config, train_one(config, workdir, session))
        return
    with ExitStack() as stack:
        if given.distributed:
            stack.enter_context(distributed.job(given.coordinator_address, given.num_processes, given.process_id))
        if jax.default_backend() != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            # So that on another host, after a preemption, nothing is compiled again.
            jax.config.update("jax_compilation_cache_dir", str(workdir / COMPILED))
            # A bucket is slow in what a limit of size needs, and in keeping what compiles in no time.
            jax.config.update("jax_compilation_cache_max_size", -1)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        train_fleet(config, workdir, command_line.parse_shard(given.shard) if given.shard else (0, 1), session)


def run() -> None:
    """The command."""
    config_flags.DEFINE_config_file(
        "config", default_config.__file__, "what to learn, such as configs/dog.py or configs/dog.py:sd15"
    )
    flags.DEFINE_string("workdir", None, "folder of the run; the same one goes on where it was", required=True)
    flags.DEFINE_string("shard", None, "I/N: take only the concepts I, I + N, I + 2 N, ... of a fleet's table")
    flags.DEFINE_bool("distributed", False, "be one of the processes of a fleet that runs on several hosts")
    flags.DEFINE_string("coordinator_address", None, "with --distributed, HOST:PORT of process 0, if JAX cannot tell")
    flags.DEFINE_integer("num_processes", None, "likewise")
    flags.DEFINE_integer("process_id", None, "likewise")
    flags.DEFINE_string("profile", None, "START:STOP: trace these steps with jax.profiler, in WORKDIR/profile")
    flags.DEFINE_bool("debug_nans", False, "if a loss is not finite, tell which operation gave the first NaN")
    command_line.run(main, resumes=True, memory_advice=MEMORY_ADVICE)


if __name__ == "__main__":
    run()
