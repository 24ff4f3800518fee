"""Learns one concept.

    python -m perfusion_jax.train --config configs/dog.py --workdir runs/dog [--config.KEY=VALUE ...]

The same command goes on where an interrupted one was. `--config configs/dog.py:sd15` learns it on Stable Diffusion 1.5.
"""

import dataclasses
import json
import os
import zlib
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
from tensorboardX import SummaryWriter
from tqdm import tqdm

from perfusion_jax import command_line, shipped, training
from perfusion_jax.base_model import BaseModel, load_base_model
from perfusion_jax.base_model.clip import Clip, load_clip
from perfusion_jax.base_model.clipseg import load_segmenter
from perfusion_jax.checkpoints import Checkpoints
from perfusion_jax.concept import Concept
from perfusion_jax.config import check, check_same, settings_of, to_json
from perfusion_jax.covariance import load_whitening
from perfusion_jax.data import dataset
from perfusion_jax.data.examples import encode, given_masks, make_examples, prompt_ids, with_mirrored
from perfusion_jax.data.masks import attention_masks, shrink
from perfusion_jax.data.pictures import Picture, fit, read_folder
from perfusion_jax.edit import Gate
from perfusion_jax.errors import InputError
from perfusion_jax.formats.concept_file import ConceptCard, save_concept
from perfusion_jax.grids import grid
from perfusion_jax.metrics import Similarities, similarities
from perfusion_jax.sampling import generate
from perfusion_jax.training import Examples, Learning


@flax.struct.dataclass
class Run:
    """All that a run keeps from step to step: the state of learning, and the best concept so far.

    Attributes:
        learning: see `training.Learning`.
        best: the concept with the best score; the newest one as long as nothing is scored.
        best_score: harmonic mean of image and text similarity, float32; -1 as long as nothing is scored.
        best_step: the step after which it was.
    """

    learning: Learning
    best: Concept
    best_score: jax.Array
    best_step: jax.Array


class Data(NamedTuple):
    """A concept's pictures as they are shown, uint8 [count, side, side, 3], and as they are learnt from."""

    pixels: np.ndarray
    examples: Examples


def load_base(config: ConfigDict) -> BaseModel:
    """Loads the frozen model that a config names."""
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}.get(
        config.dtype, jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    )
    return load_base_model(config.base, dtype=dtype, revision=config.revision or None, variant=config.variant or None)


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
    """Reads, fits and encodes a concept's pictures, and finds their masks."""
    side = config.size or base.unet.sample_size * base.vae_factor
    if side % base.vae_factor:
        raise InputError(f"config.size is {side}; it must be a multiple of {base.vae_factor}")
    pictures = [fit(picture, side, config.crop) for picture in read_pictures(config)]
    pixels = np.stack([picture.pixels for picture in pictures])
    latents = encode(base, pixels)
    masks = find_masks(config, base, pictures, latents.mean, key)
    return Data(pixels, make_examples(latents, masks, prompt_ids(base, pictures, config.templates)))


def find_masks(
    config: ConfigDict, base: BaseModel, pictures: list[Picture], latents: jax.Array, key: jax.Array
) -> np.ndarray:
    """Masks by the first way that config.masks allows, float32 [count, 2, height, width]."""
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
    flat = find(base.params, latents.reshape(-1, *latents.shape[2:]), key=key)
    return np.asarray(flat).reshape(latents.shape[:-1])


def show_masks(file: epath.Path, data: Data) -> None:
    """Writes the pictures, and under each how much the loss looks at each part of it."""
    masks = np.asarray(data.examples.masks[:, 0])
    side = data.pixels.shape[1]
    grown = masks.repeat(side // masks.shape[1], axis=1).repeat(side // masks.shape[2], axis=2)[..., None]
    shaded = (data.pixels * (0.15 + 0.85 * grown)).astype(np.uint8)
    write_picture(file, grid([data.pixels, shaded]))


def write_picture(file: epath.Path, pixels: np.ndarray) -> None:
    """Writes a PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        Image.fromarray(pixels).save(stream, "png")


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
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def __call__(self, step: int, **metrics: float) -> None:
        """Logs the metrics of a step."""
        self._lines.append(json.dumps({"step": step, **metrics}))
        self._write()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def picture(self, step: int, pixels: np.ndarray) -> None:
        """Logs a picture, uint8 [height, width, 3]."""
        self._events.add_image("samples", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        self._events.close()

    def _write(self) -> None:
        self._file.write_text("".join(f"{line}\n" for line in self._lines))


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
    base = load_base(config)
    whitening = load_metric(config, base)
    key, mask_key = jax.random.split(concept_key(config))
    data = load_data(config, base, mask_key)
    show_masks(workdir / "masks.png", data)
    settings = settings_of(config)
    start = training.start(base.new_concept(config.super_category, whitening, config.templates), settings)
    run = Run(start, start.concept, jnp.float32(-1), jnp.int32(0))

    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints)
    restored = checkpoints.restore(run, logging.warning)
    if restored is not None:
        run, _ = restored
    step = int(run.learning.step)
    if step >= config.steps and result.exists():
        print(f"finished already, after {step} steps: {result}")
        return result

    compiled = (
        jax.jit(partial(training.train_step, base, settings=settings), donate_argnames="learning")
        .lower(base.params, whitening, data.examples, run.learning, key)
        .compile()
    )
    validation = Validation(config, base, load_evaluator(config), data.pixels)
    log = Log(workdir, step)
    losses: list[jax.Array] = []
    with command_line.stopping() as stop, tqdm(total=config.steps, initial=step, unit="step", desc=config.name) as bar:
        while step < config.steps and not stop():
            learning, loss = compiled(base.params, whitening, data.examples, run.learning, key)
            run = dataclasses.replace(run, learning=learning)
            losses.append(loss)
            step += 1
            bar.update()
            last = step == config.steps
            if step % config.log_every == 0 or last:
                mean = float(np.mean(jax.device_get(losses)))
                losses = []
                if not np.isfinite(mean):
                    raise diverged(checkpoints, int(learning.step) + 1)
                bar.set_postfix(loss=f"{mean:.4f}")
                log(step, loss=mean)
            if config.validate_every and config.validation_prompts and (step % config.validate_every == 0 or last):
                run = validate(run, step, validation, log, workdir)
            if step % config.checkpoint_every == 0 or last or stop():
                checkpoints.save(step, run)
    checkpoints.close()
    log.close()
    if step < config.steps:
        raise KeyboardInterrupt
    return finish(config, base, run, result)


def begin(config: ConfigDict, workdir: epath.Path) -> None:
    """Makes the workdir and saves the config in it, or sees that it is the same config."""
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if file.exists():
            check_same(config, file.read_text(), file)
        file.write_text(to_json(config))
    except OSError as error:
        raise InputError(f"{workdir}: cannot be written ({error.strerror})") from error


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


def diverged(checkpoints: Checkpoints, step: int) -> InputError:
    """The error for a loss that is not finite; what was saved stays."""
    checkpoints.close()
    return InputError(
        f"the loss was not finite at step {step}: lower config.values_rate and config.embedding_rate, or try "
        f"config.dtype='float32'; the checkpoints of earlier steps are in {checkpoints.folder}"
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
    print(f"{result}: {os.path.getsize(result) / 1000:.0f} KB, from step {step}")
    print(
        f"draw it:  python -m perfusion_jax.sample --concept {result} "
        f"--prompt 'a photo of {card.placeholder} on the beach' --out {config.name}.png"
    )
    return result


_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "what to learn, such as configs/dog.py or configs/dog.py:sd15"
)


def main() -> None:
    """Learns the concept of --config in --workdir."""
    train(flags.FLAGS.config, epath.Path(flags.FLAGS.workdir))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of the run; the same one goes on where it was", required=True)
    flags.mark_flag_as_required("config")
    command_line.run(main)
