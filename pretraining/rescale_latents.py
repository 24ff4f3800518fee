"""Scale the latents in the middle of training: `python -m pretraining.rescale_latents`.

Turns the autoencoder's white latents into scaled ones (`autoencoder.scale_by_impact`), and the diffusion model that was
trained on the white ones into one for the others: its first and last convolutions are turned with the axes, and its
optimiser starts anew. `train_diffusion` then goes on. The white autoencoder stays beside it, and the old checkpoint.
All is written beside first and renamed last; after a kill, the same command does what is left.
"""

import pathlib
import shutil

import torch
from absl import app
from diffusers import AutoencoderKL

from pretraining import autoencoder as autoencoders
from pretraining import diffusion, places, things, train_diffusion, training_tools, vendors
from pretraining.scenes import World

SCENES = 256


def prepare(autoencoder_folder: pathlib.Path, checkpoint: pathlib.Path) -> None:
    """Writes the scaled autoencoder and the scaled checkpoint beside the white ones, the checkpoint last of all."""
    state = training_tools.load_checkpoint(checkpoint)
    if state is None:
        raise app.UsageError(f"{checkpoint}: no such checkpoint; run train_diffusion first")
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_folder).eval().requires_grad_(False)
    matrix = autoencoders.scale_by_impact(autoencoder, World(things.atlas(), places.bank()).scenes(9_004, 0, SCENES)[0])
    axes = torch.nn.functional.normalize(matrix, dim=1).float()
    scaled = {
        **{name: diffusion.turned(state[name], axes) for name in ("model", "average") if name in state},
        **diffusion.position(state),
        "average_start": state["step"],
    }
    training_tools.save_checkpoint(checkpoint.with_name("white.pt"), state)
    shutil.rmtree(autoencoder_folder.with_name("scaled"), ignore_errors=True)
    autoencoder.save_pretrained(autoencoder_folder.with_name("scaled"))
    training_tools.save_checkpoint(checkpoint.with_name("scaled.pt"), scaled)


def take_over(autoencoder_folder: pathlib.Path, checkpoint: pathlib.Path) -> None:
    """Renames what `prepare` wrote to what training reads, as far as that is not done yet."""
    white, scaled = autoencoder_folder.with_name("white"), autoencoder_folder.with_name("scaled")
    if not white.exists():
        autoencoder_folder.rename(white)
    if scaled.exists():
        scaled.rename(autoencoder_folder)
    checkpoint.with_name("scaled.pt").replace(checkpoint)


def main(_: list[str]) -> None:
    """Scales the latents of the autoencoder and of the run, which the flags of `train_diffusion` name."""
    folder = vendors.cache() / train_diffusion.AUTOENCODER.value
    checkpoint = vendors.cache() / train_diffusion.RUN.value / "constant.pt"
    if not checkpoint.with_name("scaled.pt").exists():
        if folder.with_name("white").exists():
            raise app.UsageError(f"{folder.with_name('white')} is there: the latents are scaled already")
        prepare(folder, checkpoint)
    take_over(folder, checkpoint)


if __name__ == "__main__":
    app.run(main)
