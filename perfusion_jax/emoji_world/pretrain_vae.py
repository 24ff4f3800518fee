"""Train the autoencoder: `python -m perfusion_jax.emoji_world.pretrain_vae`.

Needs the drawings (`python -m perfusion_jax.emoji_world.fetch`) and the `pretrain` extra. Running the command again
after a kill resumes. Writes checkpoint, log and reconstruction grids under the cache, and at the end
`vae/` there in diffusers' layout, with latents whitened.
"""

import numpy as np
import torch
from absl import app, flags
from diffusers import AutoencoderKL

from perfusion_jax.emoji_world import autoencoder_training as training
from perfusion_jax.emoji_world import drawings, torch_training
from perfusion_jax.emoji_world.fetch import cache_directory
from perfusion_jax.emoji_world.muon import MuonAndAdam

STAGE = flags.DEFINE_enum(
    "stage", "all", ["all", "decoder"], "Train all, or go on with the decoder alone (latents stay what they are)."
)
SAMPLES = flags.DEFINE_integer("samples", 36_000, "Pictures to train on in this stage.")
THREADS = flags.DEFINE_integer("threads", 1, "CPU threads.")

SEED = {"all": 1_000, "decoder": 1_001}
VALIDATION_SEED = 9_000
VALIDATION_SCENES = 256


def main(_: list[str]) -> None:
    """Trains and saves the autoencoder, or its decoder alone."""
    torch.set_num_threads(THREADS.value)
    settings, stage = training.Settings(), STAGE.value
    folder = cache_directory() / "vae_training"
    folder.mkdir(parents=True, exist_ok=True)
    sprites = {**drawings.world_sprites(), "other": drawings.all_world_sprites()}
    validation = training.render_batch(VALIDATION_SEED, 0, VALIDATION_SCENES, sprites, other_share=0)
    validation_others = training.render_batch(VALIDATION_SEED, 1, VALIDATION_SCENES, sprites, other_share=1)

    torch.manual_seed(SEED[stage])
    if stage == "decoder":
        autoencoder = AutoencoderKL.from_pretrained(cache_directory() / "vae")
        average = AutoencoderKL.from_pretrained(cache_directory() / "vae")
        autoencoder.encoder.requires_grad_(False)
        autoencoder.quant_conv.requires_grad_(False)
    else:
        autoencoder, average = training.build_autoencoder(settings), training.build_autoencoder(settings)
        average.load_state_dict(autoencoder.state_dict())
    optimizer = MuonAndAdam(autoencoder, settings.muon_rate, settings.adam_rate)
    total_steps, step = SAMPLES.value // settings.batch_size, 0
    checkpoint = torch_training.load_checkpoint(folder / f"{stage}.pt")
    if checkpoint is not None:
        autoencoder.load_state_dict(checkpoint["model"])
        average.load_state_dict(checkpoint["average"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]

    losses, stopwatch = [], torch_training.Stopwatch()
    while step < total_steps:
        factor = training.rate_factor(step, total_steps, settings)
        pixels = training.render_batch(SEED[stage], step, settings.batch_size, sprites, settings.other_drawings_share)
        generator = torch.Generator().manual_seed(SEED[stage] + step)
        images = torch_training.from_pixels(pixels)
        losses.append(
            training.train_step(autoencoder, optimizer, factor, images, settings, generator, stage == "decoder")
        )
        torch_training.average_weights(average, autoencoder, min(settings.average_decay, (step + 1) / (step + 10)))
        step += 1
        if step % settings.save_every == 0 or step == total_steps:
            reconstruction, divergence = np.mean(losses, axis=0)
            metrics = {
                "stage": stage,
                "samples": step * settings.batch_size,
                "loss": float(reconstruction),
                "nats_per_latent": float(divergence),
                "samples_per_second": stopwatch.rate(len(losses) * settings.batch_size),
            }
            if step % settings.look_every == 0 or step == total_steps:
                outputs = training.reconstruct(average, validation)
                metrics["psnr"] = training.mean_psnr(validation, outputs)
                metrics["psnr_other_drawings"] = training.mean_psnr(
                    validation_others, training.reconstruct(average, validation_others)
                )
                pairs = np.stack([validation[:32], outputs[:32]], axis=1).reshape(64, *validation.shape[1:])
                torch_training.save_grid(folder / f"{stage}_{step:06d}.png", pairs, columns=16)
            torch_training.append_metrics(folder / "metrics.jsonl", metrics)
            losses = []
            state = {
                "model": autoencoder.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            torch_training.save_checkpoint(folder / f"{stage}.pt", state)
            stopwatch = torch_training.Stopwatch()
    if stage == "all":
        fresh = training.render_batch(SEED[stage] + 1, 0, 2048, sprites, other_share=0)
        training.whiten(average, torch_training.from_pixels(fresh))
    average.save_pretrained(cache_directory() / "vae")


if __name__ == "__main__":
    app.run(main)
