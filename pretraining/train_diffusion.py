"""Train text encoder and UNet together: `python -m pretraining.train_diffusion`.

Needs the autoencoder (`train_autoencoder`). Running the command again after a kill resumes; running it with a larger
`--samples` goes on. The learning rate is constant, so that training can be extended at any time; `--decay_samples=N`
branches off the latest checkpoint into N more samples while the rate falls to zero, and leaves the checkpoint of the
constant phase alone. Every look writes a sheet of pictures and the model's folder. `--minutes` ends a run in time, with
a checkpoint.
"""

import copy
import dataclasses
import pathlib
import time
from typing import Any

import numpy as np
import torch
from absl import app, flags
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from pretraining import diffusion as training
from pretraining import model, places, stream, things, tokenizer, training_tools, vendors
from pretraining.scenes import World

SAMPLES = flags.DEFINE_integer("samples", 4_000_000, "Samples to train on in the constant phase.")
RATE = flags.DEFINE_float("rate", 1.0, "Factor of the learning rates.", lower_bound=0)
DECAY_SAMPLES = flags.DEFINE_integer("decay_samples", 0, "If set: samples of the decay phase to run now.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Samples a step.")
USES = flags.DEFINE_integer("uses", 4, "How often a scene is used on average.")
WORKERS = flags.DEFINE_integer("workers", 0, "Processes that invent scenes ahead.")
THREADS = flags.DEFINE_integer("threads", 0, "CPU threads; 0: as many as other processes leave free.")
MINUTES = flags.DEFINE_float("minutes", 0, "Stop after so long; 0: never.")
SAVE_EVERY = flags.DEFINE_integer("save_every", 100, "Steps between checkpoints.")
LOOK_EVERY = flags.DEFINE_integer("look_every", 1_000, "Steps between sheets of pictures.")
AUTOENCODER = flags.DEFINE_string("autoencoder", "autoencoder/model", "Folder of the autoencoder under the cache.")
COMPILE = flags.DEFINE_bool("compile", False, "Compile the UNet's steps; takes minutes, and a C++ compiler on a CPU.")
LIGHTEN = flags.DEFINE_string(
    "lighten",
    "",
    "If set: only write the averaged weights of the decay phase (or of the constant one, if there was no other), in "
    "half precision, to this file. As constant.pt it is gone on from.",
)
RUN = flags.DEFINE_string("run", "diffusion", "Folder of this run under the cache.")

VALIDATION_SEED = 9_001
VALIDATION_BATCHES = 4

LOOK_PROMPTS = (
    "a photo of a dog on the beach",
    "a photo of a cat in the snow",
    "a photo of a bear in the forest",
    "a photo of a fox in the city",
    "a photo of a lion in the desert",
    "a photo of a pig on the grass",
    "a photo of a frog under water",
    "a photo of an owl at night",
    "a photo of a car on the road",
    "a photo of a bus in the city",
    "a photo of a sailboat at sunset",
    "a photo of a rocket in space",
    "a photo of a clock on a table",
    "a photo of a camera on a table",
    "a photo of a teapot in the kitchen",
    "a photo of a guitar in a room",
    "a photo of an apple on a table",
    "a photo of a burger on a white background",
    "a photo of a cake in the kitchen",
    "a photo of a cactus in the desert",
    "a photo of a tulip in the garden",
    "a photo of a house in the mountains",
    "a photo of a robot in the rain",
    "a photo of a butterfly in the sky",
    "a photo of a green dog in the snow",
    "a photo of a purple car on the beach",
    "a photo of a pink and white elephant on the grass",
    "a photo of a cat wearing a hat in the city",
    "a photo of a dog and a cat on the beach",
    "a photo of a car next to a tree in the snow",
    "a photo of a penguin and a rocket at night",
    "a photo of a red apple and a lemon on a table",
    "a black and white photo of a lion in the forest",
    "a pencil sketch of a house",
    "a dog",
    "a photo of a dog",
)


def look(
    trainer: training.Trainer,
    autoencoder: AutoencoderKL,
    text_tokenizer: CLIPTokenizer,
    folder: pathlib.Path,
    guidance: float,
) -> None:
    """Write the model folder and a sheet of pictures drawn by the averaged weights."""
    pipeline = training.finished_pipeline(trainer.average, autoencoder, text_tokenizer)
    pictures = model.sample(pipeline, LOOK_PROMPTS, seed=0, guidance_scale=guidance)
    training_tools.save_sheet(folder / f"look_{trainer.samples:08d}.png", pictures, columns=12)
    model.save_pipeline(copy.deepcopy(pipeline), folder / "model")


def latest(folder: pathlib.Path) -> dict[str, Any] | None:
    """The state of the decay phase; or of the constant phase, if there was no other or it has gone on since."""
    decaying, constant = (training_tools.load_checkpoint(folder / name) for name in ("decaying.pt", "constant.pt"))
    if decaying and (constant is None or decaying["decay_start"] >= constant["step"]):
        return decaying
    return constant


def trained(folder: pathlib.Path) -> dict[str, Any]:
    """The same, of a model that there must be.

    Raises:
        UsageError: nothing has been trained.
    """
    state = latest(folder)
    if state is None:
        raise app.UsageError(f"{folder}: no checkpoint; run pretraining.train_diffusion first")
    return state


def open_trainer(folder: pathlib.Path, trainer: training.Trainer, decay_samples: int) -> pathlib.Path:
    """Restore where training stands; returns the path to save it at.

    A decay phase starts from the constant phase's state.
    """
    constant, decaying = folder / "constant.pt", folder / "decaying.pt"
    path = decaying if decay_samples else constant
    state = latest(folder) if decay_samples else training_tools.load_checkpoint(constant)
    if state is not None:
        trainer.restore(state)
    if decay_samples and trainer.decay_start is None:
        trainer.decay_start = trainer.step
    return path


def run(folder: pathlib.Path, settings: training.Settings) -> None:
    """Trains until `--samples` (or to the end of the decay phase), logging, looking and saving on the way."""
    began, device = time.monotonic(), training_tools.device()
    autoencoder = (
        AutoencoderKL.from_pretrained(vendors.cache() / AUTOENCODER.value).eval().requires_grad_(False).to(device)
    )
    text_tokenizer = tokenizer.save_tokenizer(vendors.cache() / "tokenizer")
    world = World(things.atlas(), places.bank(), device)
    trainer = training.make_trainer(
        text_tokenizer, autoencoder.config.latent_channels, model.grid_of(autoencoder), device, settings
    )
    if COMPILE.value:
        trainer.model.unet.compile()
    path = open_trainer(folder, trainer, DECAY_SAMPLES.value)
    schedule = model.build_scheduler().alphas_cumprod

    def noised(scenes: tuple, seed: int, number: int, settings: training.Settings = settings) -> training.Batch:
        generator = training_tools.generator(seed, number)
        return training.make_batch(*scenes, schedule, text_tokenizer.eos_token_id, generator, settings)

    def opened(seed: int, batch_size: int, uses: int, capacity: int, workers: int = 0) -> stream.Stream:
        return stream.Stream(world, autoencoder, text_tokenizer, seed, batch_size, uses, capacity, workers)

    fixed = opened(VALIDATION_SEED, 128, 1, 128).batches(0)
    evenly = dataclasses.replace(settings, middle_share=0.0)
    validation = [noised(next(fixed), VALIDATION_SEED, number, evenly) for number in range(VALIDATION_BATCHES)]
    capacity = 64 * settings.batch_size
    source = opened(training.SEED, settings.batch_size, USES.value, capacity, WORKERS.value).batches(trainer.step)
    decay_steps = DECAY_SAMPLES.value // settings.batch_size
    losses: list[torch.Tensor] = []
    watch = training_tools.Stopwatch()
    cores = None if THREADS.value or device.type == "cuda" else training_tools.FreeCores()
    while True:
        done = (
            trainer.samples >= SAMPLES.value
            if trainer.decay_start is None
            else trainer.step >= trainer.decay_start + decay_steps
        )
        if done:
            break
        if cores is not None and trainer.step % 10 == 0:
            cores.adapt()
        factor = RATE.value * training.rate_factor(trainer.step, trainer.decay_start, decay_steps, settings)
        batch = noised(next(source), training.SEED + 1, trainer.step)
        losses.append(training.train_step(trainer.model, trainer.optimizer, factor, batch))
        trainer.step += 1
        trainer.samples += settings.batch_size
        averaged = trainer.step - trainer.average_start
        decay = min(settings.average_decay, (averaged + 1) / (averaged + 10))
        training_tools.average_weights(trainer.average, trainer.model, decay)
        late = MINUTES.value > 0 and time.monotonic() - began > 60 * MINUTES.value
        saves = trainer.step % SAVE_EVERY.value == 0 or late
        if saves:
            with torch.no_grad():
                errors = [training.weighted_error(trainer.average, each).item() for each in validation]
            metrics = {
                "samples": trainer.samples,
                "loss": torch.stack(losses).mean().item(),
                "validation_loss": float(np.mean(errors)),
                "rate_factor": factor,
                "samples_per_second": watch.rate(len(losses) * settings.batch_size),
            }
            training_tools.append_metrics(folder / "metrics.jsonl", metrics)
            trainer.save(path)
        if trainer.step % LOOK_EVERY.value == 0:
            look(trainer, autoencoder, text_tokenizer, folder, settings.guidance_scale)
        if saves:
            losses, watch = [], training_tools.Stopwatch()
        if late:
            return
    trainer.save(path)
    look(trainer, autoencoder, text_tokenizer, folder, settings.guidance_scale)


def main(_: list[str]) -> None:
    """Trains text encoder and UNet."""
    if THREADS.value:
        torch.set_num_threads(THREADS.value)
    folder = vendors.cache() / RUN.value
    folder.mkdir(parents=True, exist_ok=True)
    if LIGHTEN.value:
        training_tools.save_checkpoint(pathlib.Path(LIGHTEN.value), training.lightened(trained(folder)))
        return
    run(folder, training.Settings(batch_size=BATCH_SIZE.value))


if __name__ == "__main__":
    app.run(main)
