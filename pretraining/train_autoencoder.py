"""Train the autoencoder: `python -m pretraining.train_autoencoder --layout=4x8`.

Resumes when it is given again. When it is through, the latents are whitened, and the model's folder is
written beside the checkpoint, with a sheet of pictures and their reconstructions: scenes of the world, and drawings of
vendors that it never saw.
"""

import copy
import pathlib

import numpy as np
import torch
from absl import app, flags

from perfusion_jax.emoji_world.muon import MuonAndAdam
from pretraining import autoencoder as autoencoders
from pretraining import held_out, places, things, training_tools, vendors
from pretraining.scenes import World

LAYOUT = flags.DEFINE_enum("layout", "4x8", list(autoencoders.LAYOUTS), "Factor and channels of the latents.")
SAMPLES = flags.DEFINE_integer("samples", 400_000, "Pictures to train on.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures a step.")
THREADS = flags.DEFINE_integer("threads", 0, "CPU threads; 0: as many as other processes leave free.")
RUN = flags.DEFINE_string("run", "", "Folder of this run under the cache; by the layout if empty.")

SEED = 1_000
SAVE_EVERY = 200
WHITENING_SCENES = 4_096


def run(folder: pathlib.Path, settings: autoencoders.Settings, samples: int) -> None:
    """Trains, logging and saving on the way; whitens and writes the model at the end."""
    device = training_tools.device()
    torch.manual_seed(SEED)
    world = World(things.atlas(), places.bank(), device)
    model = autoencoders.build_autoencoder(settings).to(device)
    optimizer = MuonAndAdam(model, settings.muon_rate, settings.adam_rate)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    step, total = 0, samples // settings.batch_size
    path = folder / "checkpoint.pt"
    if state := training_tools.load_checkpoint(path):
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        training_tools.restore_optimizer(optimizer, state["optimizer"])
        step = state["step"]
    tests = {"world": world.scenes(9_001, 0, 256)[0], "held_out": held_out.some_alone(world, 256, 9_002)[0]}
    losses, watch = [], training_tools.Stopwatch()
    cores = None if THREADS.value or device.type == "cuda" else training_tools.FreeCores()
    while step < total:
        if cores is not None and step % 20 == 0:
            cores.adapt()
        pictures = world.scenes(SEED, step, settings.batch_size)[0]
        generator = training_tools.generator(SEED + 1, step)
        factor = autoencoders.rate_factor(step, total, settings)
        losses.append(autoencoders.train_step(model, optimizer, factor, pictures, settings, generator))
        step += 1
        training_tools.average_weights(average, model, min(settings.average_decay, step / (step + 9)))
        if step % SAVE_EVERY == 0 or step == total:
            training_tools.save_checkpoint(
                path,
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                },
            )
            mean = np.mean(losses, axis=0)
            metrics = {"samples": step * settings.batch_size, "loss": float(mean[0]), "divergence": float(mean[1])}
            metrics["samples_per_second"] = watch.rate(len(losses) * settings.batch_size)
            if step % (5 * SAVE_EVERY) == 0 or step == total:
                for name, pictures in tests.items():
                    scores = autoencoders.psnr(pictures, autoencoders.reconstruct(average, pictures))
                    metrics[f"psnr_{name}"] = float(scores.mean())
                pairs = torch.stack([tests["held_out"][:32], autoencoders.reconstruct(average, tests["held_out"][:32])])
                sheet = pairs.permute(1, 0, 2, 3, 4).flatten(0, 1)
                training_tools.save_sheet(folder / "held_out.png", training_tools.to_pixels(sheet), 8, 3)
            training_tools.append_metrics(folder / "metrics.jsonl", metrics)
            losses, watch = [], training_tools.Stopwatch()
    autoencoders.whiten(average, world.scenes(9_003, 0, WHITENING_SCENES)[0])
    average.cpu().save_pretrained(folder / "model")


def main(_: list[str]) -> None:
    """Trains one layout."""
    if THREADS.value:
        torch.set_num_threads(THREADS.value)
    settings = autoencoders.dataclasses.replace(autoencoders.LAYOUTS[LAYOUT.value], batch_size=BATCH_SIZE.value)
    held_out.prepare()
    folder = vendors.cache() / (RUN.value or f"autoencoder_{LAYOUT.value}")
    folder.mkdir(parents=True, exist_ok=True)
    run(folder, settings, SAMPLES.value)


if __name__ == "__main__":
    app.run(main)
