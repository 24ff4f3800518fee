"""Learns a concept, or a table of them if the config names one.

    python -m perfusion_jax.train --config configs/dog.py --workdir runs/dog [--config.KEY=VALUE ...]
    python -m perfusion_jax.train --config configs/fleet.py --workdir runs/fleet [--config.concepts=TABLE]

The same command goes on where an interrupted one was. `--config configs/dog.py:sd15` learns it on Stable Diffusion 1.5.
"""

import dataclasses
import os
import shlex
import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from perfusion_jax import command_line, distributed, training
from perfusion_jax.base_model import BaseModel
from perfusion_jax.checkpoints import Checkpoints
from perfusion_jax.concept import Concept
from perfusion_jax.config import check, is_fleet, settings_of
from perfusion_jax.data.table import parse_shard
from perfusion_jax.errors import InputError
from perfusion_jax.files import locked
from perfusion_jax.fleet import train_fleet
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.parallel import MEMORY_ADVICE
from perfusion_jax.preparation import concept_key, load_base, load_evaluator, load_metric, prepare_data, read_pictures
from perfusion_jax.training import Learning
from perfusion_jax.validation import Validation, show_masks
from perfusion_jax.workdir import Log, begin, write_concept


@flax.struct.dataclass
class Run:
    """All that a run keeps from step to step: the state of learning, and the best concept so far.

    Attributes:
        learning: see `training.Learning`.
        best: the concept with the best score; the untrained one as long as nothing is scored.
        best_score: `Similarities.score`, float32; -1 as long as nothing is scored.
        best_step: the step after which it was.
    """

    learning: Learning
    best: Concept
    best_score: jax.Array
    best_step: jax.Array


def train(config: ConfigDict, workdir: epath.Path) -> Path:
    """Learns the concept of a config, or goes on with it.

    Returns:
        The concept's file.

    Raises:
        InputError: the config or something it names cannot be used, another job is at work in the workdir, or the loss
            is no longer finite.
        UnavailableError: storage or the hub fails.
    """
    check(config)
    result = workdir / "concepts" / f"{config.name}.safetensors"
    with locked(workdir / "lock", "take another --workdir"):
        begin(config, workdir)
        with closing(Checkpoints(workdir / "checkpoints", config.keep_checkpoints)) as checkpoints:
            if checkpoints.latest() >= config.steps and result.exists():
                print(f"finished already, after {checkpoints.latest()} steps: {result}")
                return result
            base = load_base(config)
            run = learn(config, base, workdir, checkpoints)
        if int(run.learning.step) < config.steps:
            raise KeyboardInterrupt
        return finish(config, base, run, result)


def learn(config: ConfigDict, base: BaseModel, workdir: epath.Path, checkpoints: Checkpoints) -> Run:
    """Takes the steps that are left, or those until it is told to stop; all of it is saved when it returns.

    Raises:
        InputError, UnavailableError: as for `train`.
    """
    evaluator = load_evaluator(config)
    whitening = load_metric(config, base)
    key, mask_key = jax.random.split(concept_key(config))
    data = prepare_data(config, base, read_pictures(config.pictures), mask_key)
    show_masks(workdir / "masks.png", data)
    validation = Validation(config, base, evaluator, data.pixels)
    settings = settings_of(config)
    start = training.start(base.new_concept(config.super_category, whitening, data.prompts), settings)
    # Copied, for the first step takes the state's own buffers.
    run = Run(start, jax.tree.map(jnp.copy, start.concept), jnp.float32(-1), jnp.int32(0))
    restored = checkpoints.restore(run, logging.warning)
    if restored is not None:
        run, _ = restored
    step = int(run.learning.step)

    compiled = (
        jax.jit(partial(training.train_step, base, settings=settings), donate_argnames="learning")
        .lower(base.params, whitening, data.examples, run.learning, key)
        .compile()
    )
    saved = step
    losses: list[jax.Array] = []
    unread: list[tuple[int, list[jax.Array]]] = []
    with (
        closing(Log(workdir, step)) as log,
        command_line.stopping() as stop,
        tqdm(total=config.steps, initial=step, unit="step", desc=config.name) as bar,
    ):
        while step < config.steps and not stop():
            learning, loss = compiled(base.params, whitening, data.examples, run.learning, key)
            run = dataclasses.replace(run, learning=learning)
            losses.append(loss)
            step += 1
            bar.update()
            last = step == config.steps
            logs, saves = (last or step % every == 0 for every in (config.log_every, config.checkpoint_every))
            validates = config.validate_every and (last or step % config.validate_every == 0)
            if logs or validates or saves:
                unread.append((step, losses))
                losses = []
                # The newest losses are read one time later: they may still be on their way while the device works on.
                read_losses(unread, 0 if validates or saves else 1, log, bar, checkpoints)
            if validates and config.validation_prompts:
                run = validate(run, step, validation, log, workdir)
            if saves:
                log.flush()
                checkpoints.save(step, run)
                saved = step
        if step > saved:
            read_losses([*unread, (step, losses)], 0, log, bar, checkpoints)
            log.flush()
            checkpoints.save(step, run)
    return run


def read_losses(
    unread: list[tuple[int, list[jax.Array]]], left: int, log: Log, bar: tqdm, checkpoints: Checkpoints
) -> None:
    """Logs mean losses, oldest first.

    Args:
        unread: (step, losses of the steps up to it); what is logged is taken out.
        left: how many entries to leave.
        log, bar: where they are shown.
        checkpoints: of the run, named if it cannot go on.

    Raises:
        InputError: a loss is not finite.
    """
    while len(unread) > left:
        step, losses = unread.pop(0)
        values = np.asarray(jax.device_get(losses), np.float32)
        if not len(values):
            continue
        if not np.isfinite(values).all():
            first = step - len(values) + 1 + int(np.argmin(np.isfinite(values)))
            raise InputError(
                f"the loss or its gradient was not finite at step {first}: in a new --workdir, lower "
                "config.values_rate and config.embedding_rate, or try config.dtype='float32'; earlier checkpoints: "
                f"{checkpoints.folder}"
            )
        bar.set_postfix(loss=f"{values.mean():.4f}")
        log(step, loss=float(values.mean()))


def validate(run: Run, step: int, validation: Validation, log: Log, workdir: epath.Path) -> Run:
    """Draws and scores the concept as it is, and keeps it if it is the best so far."""
    drawn, sheet = validation.draw(run.learning.concept)
    write_picture(workdir / "samples" / f"step_{step:06d}.png", sheet)
    log.picture(step, sheet)
    scores = validation.score(drawn)
    if scores is None:
        return run
    log(
        step,
        image_similarity=scores.image,
        text_similarity=scores.text,
        prompt_precision=scores.precision,
        score=scores.score,
    )
    if scores.score <= run.best_score:
        return run
    return dataclasses.replace(
        run,
        # The step's buffers are donated to the next step: the best one needs its own.
        best=jax.tree.map(jnp.copy, run.learning.concept),
        best_score=jnp.float32(scores.score),
        best_step=jnp.int32(step),
    )


def finish(config: ConfigDict, base: BaseModel, run: Run, result: epath.Path) -> Path:
    """Writes the concept: the best scored one, or the last."""
    scored = float(run.best_score) >= 0
    concept = run.best if scored else run.learning.concept
    step = int(run.best_step if scored else run.learning.step)
    card = write_concept(result, config, base, concept, step)
    print(f"{result}: {result.stat().length / 1000:.0f} KB, from step {step}")
    arguments = {
        "concept": str(result),
        "prompt": f"a photo of a {card.placeholder} on the beach",
        "out": f"{config.name}.png",
        "base": "" if config.base == "emoji" else config.base,
        "revision": config.revision,
        "variant": config.variant,
        "height": config.size or "",
        "width": config.size or "",
        "strength": "" if config.edit else 0,
    }
    words = [word for name, value in arguments.items() if value != "" for word in (f"--{name}", str(value))]
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    print(f"draw it:  {shlex.quote(str(python))} -m perfusion_jax.sample {shlex.join(words)}")
    return result


def main() -> None:
    """Learns the concept of --config in --workdir, or the concepts if it names a table of them.

    Raises:
        InputError: --shard or --distributed is given for one concept, or as for `train` and `train_fleet`.
    """
    given = flags.FLAGS
    config, workdir = given.config, epath.Path(given.workdir)
    if not is_fleet(config):
        if given.shard or given.distributed:
            raise InputError("--shard and --distributed are for fleets: config.concepts names none")
        train(config, workdir)
        return
    with ExitStack() as stack:
        if given.distributed:
            stack.enter_context(distributed.job(given.coordinator_address, given.num_processes, given.process_id))
        if jax.default_backend() != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            # So that after a preemption nothing is compiled again.
            jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
        train_fleet(config, workdir, parse_shard(given.shard) if given.shard else (0, 1))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "what to learn, such as configs/dog.py or configs/dog.py:sd15")
    flags.DEFINE_string("workdir", None, "folder of the run; the same one goes on where it was", required=True)
    flags.DEFINE_string("shard", None, "I/N: take only the concepts I, I + N, I + 2 N, ... of a fleet's table")
    flags.DEFINE_bool("distributed", False, "be one of the processes of a fleet that runs on several hosts")
    flags.DEFINE_string("coordinator_address", None, "with --distributed, HOST:PORT of process 0, if JAX cannot tell")
    flags.DEFINE_integer("num_processes", None, "likewise")
    flags.DEFINE_integer("process_id", None, "likewise")
    flags.mark_flag_as_required("config")
    command_line.run(main, resumes=True, memory_advice=MEMORY_ADVICE)
