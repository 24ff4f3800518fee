"""Train text encoder and UNet together: `python -m perfusion_jax.emoji_world.pretrain_diffusion`.

Needs the autoencoder (`pretrain_vae`). Running the command again after a kill resumes; running it with a larger
`--samples` goes on. The learning rate is constant, so that training can be extended at any time; `--decay_samples=N`
branches off the latest checkpoint into N more samples while the rate falls to zero, and leaves the checkpoint of the
constant phase alone. Every look writes a grid of pictures and the model folder `model/` under the cache.
"""

import copy
import pathlib

import numpy as np
import torch
from absl import app, flags
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from perfusion_jax.emoji_world import diffusion_training as training
from perfusion_jax.emoji_world import drawings, latent_shards, model_folder, tokenizer, torch_training
from perfusion_jax.emoji_world.fetch import cache_directory

SAMPLES = flags.DEFINE_integer("samples", 256_000, "Samples to train on in the constant phase.")
DECAY_SAMPLES = flags.DEFINE_integer("decay_samples", 0, "If set: samples of the decay phase to run now.")
THREADS = flags.DEFINE_integer("threads", 0, "CPU threads; 0: as many as other processes leave free.")
RUN = flags.DEFINE_string("run", "diffusion_training", "Folder of this run under the cache.")

VALIDATION_SEED = 9_001
VALIDATION_SCENES = 512

LOOK_PROMPTS = (
    "a photo of a dog on the beach",
    "a photo of a cat in the snow",
    "a photo of a bear in the forest",
    "a photo of a fox in the city",
    "a photo of a lion in the desert",
    "a photo of a pig on the grass",
    "a photo of a frog under water",
    "a photo of a rabbit at night",
    "a photo of a panda in the mountains",
    "a photo of a penguin in the snow",
    "a photo of an owl at night",
    "a photo of an octopus under water",
    "a photo of an elephant on the grass",
    "a photo of a whale on the beach",
    "a photo of a car in the city",
    "a photo of a bus in the desert",
    "a photo of a boat in the mountains",
    "a photo of a rocket at night",
    "a photo of a clock on a table",
    "a photo of a camera on a table",
    "a photo of an umbrella on the beach",
    "a photo of a shoe on the grass",
    "a photo of a house in the forest",
    "a photo of a guitar on a white background",
    "a photo of an apple on a table",
    "a photo of a strawberry on a blue background",
    "a photo of a burger in the city",
    "a photo of a cactus in the desert",
    "a photo of a blue dog in the snow",
    "a photo of a purple car on the beach",
    "a photo of a cat wearing a crown on the grass",
    "a photo of a bear wearing a hat in the city",
    "a photo of a dog and a cat on the beach",
    "a photo of a car and an apple in the snow",
    "a photo of a penguin and a rocket at night",
    "a photo of a burger and a guitar on the grass",
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
    settings: training.Settings,
) -> None:
    """Write the model folder and a grid of pictures drawn by the averaged weights."""
    pipeline = training.finished_pipeline(trainer.average, autoencoder, text_tokenizer)
    pictures = model_folder.sample(pipeline, LOOK_PROMPTS, seed=0, guidance_scale=settings.guidance_scale)
    torch_training.save_grid(folder / f"look_{trainer.step:06d}.png", pictures, columns=8)
    model_folder.save_pipeline(copy.deepcopy(pipeline), folder / "model")


def run(folder: pathlib.Path, settings: training.Settings, samples: int, decay_samples: int) -> None:
    """Trains until `samples` (or to the end of the decay phase), logging, looking and saving on the way."""
    autoencoder = AutoencoderKL.from_pretrained(cache_directory() / "vae").eval()
    text_tokenizer = tokenizer.save_tokenizer(cache_directory() / "tokenizer")
    trainer, path = training.open_trainer(
        folder, text_tokenizer, autoencoder.config.latent_channels, settings, decay_samples
    )
    decay_steps = decay_samples // settings.batch_size
    last_step = samples // settings.batch_size if trainer.decay_start is None else trainer.decay_start + decay_steps
    schedule = model_folder.build_scheduler().alphas_cumprod

    def noised(scenes: dict[str, np.ndarray], seed: int, number: int) -> training.Batch:
        generator = torch.Generator().manual_seed(seed * 2**32 + number)
        return training.make_batch(scenes, schedule, text_tokenizer.eos_token_id, generator, settings)

    sprites = drawings.world_sprites()
    validation = [
        noised(
            latent_shards.encode_scenes(
                VALIDATION_SEED, first, settings.batch_size, sprites, autoencoder, text_tokenizer
            ),
            VALIDATION_SEED,
            first,
        )
        for first in range(0, VALIDATION_SCENES, settings.batch_size)
    ]
    batches = latent_shards.batches(
        cache_directory() / "latents", training.SEED, trainer.step, settings.batch_size, autoencoder, text_tokenizer
    )
    losses, stopwatch = [], torch_training.Stopwatch()
    free_cores = None if THREADS.value else torch_training.FreeCores()
    while trainer.step < last_step:
        if free_cores is not None:
            free_cores.adapt()
        factor = training.rate_factor(trainer.step, trainer.decay_start, decay_steps, settings)
        batch = noised(next(batches), training.SEED, trainer.step)
        losses.append(training.train_step(trainer.model, trainer.optimizer, factor, batch))
        decay = min(settings.average_decay, (trainer.step + 1) / (trainer.step + 10))
        torch_training.average_weights(trainer.average, trainer.model, decay)
        trainer.step += 1
        last = trainer.step == last_step
        if trainer.step % settings.save_every == 0 or last:
            metrics = {
                "samples": trainer.step * settings.batch_size,
                "loss": float(np.mean(losses)),
                "validation_loss": training.validation_loss(trainer.average, validation),
                "rate_factor": factor,
                "samples_per_second": stopwatch.rate(len(losses) * settings.batch_size),
            }
            torch_training.append_metrics(folder / "metrics.jsonl", metrics)
            trainer.save(path)
            if trainer.step % settings.look_every == 0 or last:
                look(trainer, autoencoder, text_tokenizer, folder, settings)
            losses, stopwatch = [], torch_training.Stopwatch()


def main(_: list[str]) -> None:
    """Trains text encoder and UNet."""
    if THREADS.value:
        torch.set_num_threads(THREADS.value)
    folder = pathlib.Path(cache_directory() / RUN.value)
    folder.mkdir(parents=True, exist_ok=True)
    run(folder, training.Settings(), SAMPLES.value, DECAY_SAMPLES.value)


if __name__ == "__main__":
    app.run(main)
