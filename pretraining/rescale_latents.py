"""Scale the latents in the middle of training: `python -m pretraining.rescale_latents`.

Turns the autoencoder's white latents into scaled ones (`autoencoder.scale_by_impact`), and the diffusion model that was
trained on the white ones into one for the others: its first and last convolutions are turned with the axes, and its
optimiser starts anew. `train_diffusion` then goes on. The white autoencoder stays beside it, and the old checkpoint.
"""

import torch
from absl import app, flags
from diffusers import AutoencoderKL

from pretraining import autoencoder as autoencoders
from pretraining import diffusion, places, things, training_tools, vendors
from pretraining.scenes import World

AUTOENCODER = flags.DEFINE_string("autoencoder", "autoencoder", "Folder of the autoencoder's run under the cache.")
RUN = flags.DEFINE_string("run", "diffusion", "Folder of the diffusion model's run under the cache.")

SCENES = 256


def main(_: list[str]) -> None:
    """Scales the latents of the autoencoder and of the run."""
    folder, path = vendors.cache() / AUTOENCODER.value, vendors.cache() / RUN.value / "constant.pt"
    if (folder / "white").exists():
        raise app.UsageError(f"{folder / 'white'} is there: the latents are scaled already")
    state = training_tools.load_checkpoint(path)
    if state is None:
        raise app.UsageError(f"{path}: no such checkpoint; run train_diffusion first")
    autoencoder = AutoencoderKL.from_pretrained(folder / "model").eval().requires_grad_(False)
    matrix = autoencoders.scale_by_impact(autoencoder, World(things.atlas(), places.bank()).scenes(9_004, 0, SCENES)[0])
    axes = torch.nn.functional.normalize(matrix, dim=1).float()
    scaled = {
        **{name: diffusion.turned(state[name], axes) for name in ("model", "average")},
        **{name: state[name] for name in diffusion.POSITION},
        "average_start": state["step"],
    }
    training_tools.save_checkpoint(path.with_name("white.pt"), state)
    (folder / "model").rename(folder / "white")
    autoencoder.save_pretrained(folder / "model")
    training_tools.save_checkpoint(path, scaled)


if __name__ == "__main__":
    app.run(main)
