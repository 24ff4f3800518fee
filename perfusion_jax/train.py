"""Learns one concept.

    python -m perfusion_jax.train --config configs/dog.py --workdir runs/dog [--config.KEY=VALUE ...]

The same command goes on where an interrupted one was. `--config configs/dog.py:sd15` learns it on Stable Diffusion 1.5.
"""

import dataclasses
import io
import json
import shlex
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from perfusion_jax import command_line, shipped, training
from perfusion_jax.base_model import BaseModel, load_base_model, network_dtype
from perfusion_jax.base_model.clip import Clip, load_clip
from perfusion_jax.base_model.clipseg import load_segmenter
from perfusion_jax.checkpoints import Checkpoints
from perfusion_jax.concept import Concept
from perfusion_jax.config import check, check_same, settings_of, to_json
from perfusion_jax.covariance import load_whitening
from perfusion_jax.data import dataset
from perfusion_jax.data.examples import (
    Examples,
    encode,
    given_masks,
    make_examples,
    on_latents,
    prompt_ids,
    prompts_used,
    with_mirrored,
)
from perfusion_jax.data.masks import attention_masks, shrink
from perfusion_jax.data.pictures import Picture, fit, read_folder
from perfusion_jax.edit import Gate
from perfusion_jax.errors import InputError
from perfusion_jax.files import write_bytes
from perfusion_jax.formats.concept_file import ConceptCard, save_concept
from perfusion_jax.grids import grid
from perfusion_jax.metrics import Similarities, similarities
from perfusion_jax.sampling import generate
from perfusion_jax.training import Learning


@flax.struct.dataclass
class Run:
    """All that a run keeps from step to step: the state of learning, and the best concept so far.

    Attributes:
        learning: see `training.Learning`.
        best: the concept with the best score; the untrained one as long as nothing is scored.
        best_score: harmonic mean of image and text similarity, float32; -1 as long as nothing is scored.
        best_step: the step after which it was.
    """

    learning: Learning
    best: Concept
    best_score: jax.Array
    best_step: jax.Array


class Data(NamedTuple):
    """A concept's data.

    Attributes:
        pixels: the pictures as they are shown, uint8 [count, side, side, 3].
        prompts: those of training, each once, with {} where the concept's name goes.
        examples: what the step draws from.
    """

    pixels: np.ndarray
    prompts: list[str]
    examples: Examples


def load_base(config: ConfigDict) -> BaseModel:
    """Loads the frozen model that a config names."""
    return load_base_model(
        config.base,
        dtype=network_dtype(config.dtype),
        revision=config.revision or None,
        variant=config.variant or None,
    )


def load_metric(config: ConfigDict, base: BaseModel) -> jax.Array:
    """C^-1/2 of the base model's text encoder.

    Raises:
        InputError: the config names no file of C and none came with the model.
    """
    file = config.covariance or base.covariance
    if not file:
        raise InputError(
            f"config.covariance is empty, and no covariance came with {config.base}: measure it once with "
            f"`python -m perfusion_jax.covariance --base {config.base} --captions captions.txt --out covariance.npz`"
        )
    return load_whitening(file, base.context_width)


def load_evaluator(config: ConfigDict) -> Clip | None:
    """The CLIP that scores validation pictures, or None if there is none."""
    folder = config.evaluator or (shipped.EVALUATOR if config.base == "emoji" else None)
    return load_clip(folder) if folder else None


def read_pictures(config: ConfigDict) -> list[Picture]:
    """Reads the pictures that a config names.

    Raises:
        InputError: they cannot be read, or the package has no such example.
    """
    if config.pictures.startswith(dataset.PREFIX):
        return dataset.read_split(config.pictures)
    if not config.pictures.startswith("emoji:"):
        return read_folder(config.pictures)
    name = config.pictures.removeprefix("emoji:")
    examples = sorted(folder.name for folder in shipped.EXAMPLES.iterdir() if folder.is_dir())
    if name not in examples:
        raise InputError(f"config.pictures is {config.pictures!r}; the examples are {', '.join(examples)}")
    return read_folder(shipped.EXAMPLES / name)


def load_data(config: ConfigDict, base: BaseModel, key: jax.Array) -> Data:
    """Reads, fits and encodes a concept's pictures, and finds their masks.

    Raises:
        InputError: the pictures, masks or prompts cannot be used.
    """
    side = config.size or base.unet.sample_size * base.vae_factor
    if side % base.vae_factor:
        raise InputError(f"config.size is {side}; it must be a multiple of {base.vae_factor}")
    pictures = [fit(picture, side, config.crop) for picture in read_pictures(config)]
    pixels = np.stack([picture.pixels for picture in pictures])
    latents = encode(base, pixels)
    masks = find_masks(config, base, pictures, latents.mean, key)
    whole = np.ones((side, side), np.float32)
    masks = masks * on_latents(base, [whole if picture.inside is None else picture.inside for picture in pictures])
    ids = prompt_ids(base, pictures, config.templates)
    return Data(pixels, prompts_used(pictures, config.templates), make_examples(latents, masks, ids))


def find_masks(
    config: ConfigDict, base: BaseModel, pictures: list[Picture], latents: jax.Array, key: jax.Array
) -> np.ndarray:
    """Finds masks by the first way that config.masks allows.

    Args:
        config: the run's.
        base: the model.
        pictures: square ones.
        latents: means of the pictures' and their mirror images' latents, [count, 2, height, width, channels].
        key: of the noise in which the UNet is asked.

    Returns:
        float32 [count, 2, height, width].

    Raises:
        InputError: there are no masks of the kind that the config insists on.
    """
    if config.masks == "none":
        return np.ones(latents.shape[:-1], np.float32)
    if config.masks in ("auto", "files"):
        masks = given_masks(base, pictures)
        if masks is not None:
            return masks
        if config.masks == "files":
            raise InputError(
                f"config.masks is 'files', but {config.pictures} has no masks/ folder and no picture with transparency"
            )
    if config.masks == "segmenter" and not config.segmenter:
        raise InputError("config.masks is 'segmenter', but config.segmenter names none")
    if config.segmenter and config.masks != "attention":
        segmenter = load_segmenter(config.segmenter)
        ids = segmenter.tokenizer([config.super_category] * 2)
        pairs = with_mirrored(np.stack([picture.pixels for picture in pictures])).astype(np.float32) / 127.5 - 1
        segment = jax.jit(segmenter.masks)
        masks = np.concatenate([segment(segmenter.params, ids, pair) for pair in pairs])
        return shrink(masks, base.vae_factor).reshape(latents.shape[:-1])
    find = jax.jit(partial(attention_masks, base, super_category=config.super_category))
    return np.stack([find(base.params, pair, key=key) for pair in latents])


def show_masks(file: epath.Path, data: Data) -> None:
    """Writes the pictures, and under each how much the loss looks at each part of it."""
    masks = np.asarray(data.examples.masks[:, 0])
    side = data.pixels.shape[1]
    grown = masks.repeat(side // masks.shape[1], axis=1).repeat(side // masks.shape[2], axis=2)[..., None]
    shaded = (data.pixels * (0.15 + 0.85 * grown)).astype(np.uint8)
    write_picture(file, grid([data.pixels, shaded]))


def write_picture(file: epath.Path, pixels: np.ndarray) -> None:
    """Writes a PNG."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    write_bytes(file, stream.getvalue())


def concept_key(config: ConfigDict) -> jax.Array:
    """The random key of a concept: it depends on its seed and its name alone."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(config.name.encode()))


class Validation:
    """Sample grids and scores.

    Args:
        config: the run's.
        base: the model.
        clip: the evaluator, or None.
        own: the concept's pictures, uint8 [count, side, side, 3].
    """

    def __init__(self, config: ConfigDict, base: BaseModel, clip: Clip | None, own: np.ndarray):
        self._config, self._base, self._clip, self._own = config, base, clip, own

    def draw(self, concept: Concept) -> tuple[np.ndarray, np.ndarray]:
        """Draws the validation prompts with fixed seeds.

        Returns:
            (pictures, uint8 [prompts, pictures_per_prompt, side, side, 3]; a grid of them with one row per prompt
            and the
            concept's own pictures on the left, uint8 [height, width, 3]).
        """
        config = self._config
        count = config.pictures_per_prompt
        prompts = [p.replace("{}", f"<{config.name}>") for p in config.validation_prompts for _ in range(count)]
        side = self._own.shape[1]
        drawn = generate(
            self._base,
            prompts,
            range(len(prompts)),
            concepts={f"<{config.name}>": concept},
            gates=Gate(config.sampling_bias, config.sampling_temperature, float(config.edit)),
            steps=config.sampling_steps,
            guidance_scale=config.guidance_scale,
            height=side,
            width=side,
            batch_size=min(8, len(prompts)),
        ).reshape(-1, count, side, side, 3)
        rows = [np.concatenate([self._own[[row % len(self._own)]], pictures]) for row, pictures in enumerate(drawn)]
        return drawn, grid(rows)

    def score(self, drawn: np.ndarray) -> Similarities | None:
        """Scores what `draw` drew, or None without an evaluator."""
        if self._clip is None:
            return None
        texts = [
            prompt.replace("{}", self._config.super_category)
            for prompt in self._config.validation_prompts
            for _ in range(drawn.shape[1])
        ]
        return similarities(self._clip, drawn.reshape(-1, *drawn.shape[2:]), texts, self._own)


class Log:
    """metrics.jsonl and TensorBoard events of a run.

    Args:
        workdir: where.
        step: the step that the run goes on from: what was logged after it is dropped, and will be logged again.
    """

    def __init__(self, workdir: epath.Path, step: int):
        self._file = workdir / "metrics.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._lines = [line for line in lines if _step_of(line) <= step]
        self._write()
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and the run then waits for ever.
        with self._write_errors():
            (workdir / "tensorboard").mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
        # Tells TensorBoard to forget what an earlier run logged after this step.
        self._add(Event(session_log=SessionLog(status=SessionLog.START)), step)

    def __call__(self, step: int, **metrics: float) -> None:
        """Logs the metrics of a step."""
        self._lines.append(json.dumps({"step": step, **metrics}))
        self._write()
        for name, value in metrics.items():
            self._add(Event(summary=summary.scalar(name, value)), step)

    def picture(self, step: int, pixels: np.ndarray) -> None:
        """Logs a picture, uint8 [height, width, 3]."""
        self._add(Event(summary=summary.image("samples", pixels, dataformats="HWC")), step)

    def close(self) -> None:
        """Writes what is left.

        Raises:
            InputError: it cannot be written.
        """
        with self._write_errors():
            self._events.close()

    def _add(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        with self._write_errors():
            self._events.write_event(event)
            self._events.flush()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self._file.parent / 'tensorboard'}: cannot be written ({error.strerror})") from error

    def _write(self) -> None:
        write_bytes(self._file, "".join(f"{line}\n" for line in self._lines).encode())


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # cut off by a kill


def train(config: ConfigDict, workdir: epath.Path) -> Path:
    """Learns the concept of a config, or goes on with it.

    Returns:
        The concept's file.

    Raises:
        InputError: the config or something it names cannot be used, or the loss is no longer finite.
    """
    check(config)
    result = workdir / "concepts" / f"{config.name}.safetensors"
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
        InputError: as for `train`.
    """
    clip = load_evaluator(config)
    whitening = load_metric(config, base)
    key, mask_key = jax.random.split(concept_key(config))
    data = load_data(config, base, mask_key)
    show_masks(workdir / "masks.png", data)
    validation = Validation(config, base, clip, data.pixels)
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
                checkpoints.save(step, run)
                saved = step
        if step > saved:
            read_losses([*unread, (step, losses)], 0, log, bar, checkpoints)
            checkpoints.save(step, run)
    return run


def begin(config: ConfigDict, workdir: epath.Path) -> None:
    """Makes the workdir and saves the config in it, or sees that it is the same config."""
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if file.exists():
            check_same(config, file.read_text(), file)
    except OSError as error:
        raise InputError(f"{workdir}: cannot be written ({error.strerror})") from error
    write_bytes(file, to_json(config).encode())


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
    log(step, image_similarity=scores.image, text_similarity=scores.text, score=scores.harmonic_mean)
    if scores.harmonic_mean <= run.best_score:
        return run
    return dataclasses.replace(
        run,
        # The step's buffers are donated to the next step: the best one needs its own.
        best=jax.tree.map(jnp.copy, run.learning.concept),
        best_score=jnp.float32(scores.harmonic_mean),
        best_step=jnp.int32(step),
    )


def finish(config: ConfigDict, base: BaseModel, run: Run, result: epath.Path) -> Path:
    """Writes the concept: the best scored one, or the last."""
    scored = float(run.best_score) >= 0
    concept = run.best if scored else run.learning.concept
    step = int(run.best_step if scored else run.learning.step)
    card = ConceptCard(
        name=config.name,
        super_category=config.super_category,
        base_model=config.base,
        fingerprint=base.fingerprint,
        bias=config.sampling_bias,
        temperature=config.sampling_temperature,
        step=step,
        licence=config.licence,
    )
    save_concept(result, concept, card)
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
        "guidance": config.guidance_scale,
        "strength": "" if config.edit else 0,
    }
    words = [word for name, value in arguments.items() if value != "" for word in (f"--{name}", str(value))]
    print(f"draw it:  python -m perfusion_jax.sample {shlex.join(words)}")
    return result


def main() -> None:
    """Learns the concept of --config in --workdir."""
    train(flags.FLAGS.config, epath.Path(flags.FLAGS.workdir))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "what to learn, such as configs/dog.py or configs/dog.py:sd15")
    flags.DEFINE_string("workdir", None, "folder of the run; the same one goes on where it was", required=True)
    flags.mark_flag_as_required("config")
    command_line.run(main)
