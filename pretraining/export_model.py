"""Put the trained parts together: `python -m pretraining.export_model --out=FOLDER`.

Writes FOLDER/model, the Stable Diffusion folder in half precision: the text encoder and UNet of the decay phase (or of
the constant phase, if there was no other), and the autoencoder; and beside it the judges, FOLDER/clip and
FOLDER/instance, where they are trained.
"""

import pathlib
import shutil

import torch
from absl import app, flags
from diffusers import AutoencoderKL

from pretraining import diffusion, model, tokenizer, train_diffusion, vendors

OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)


def main(_: list[str]) -> None:
    """Writes the folders and prints their size."""
    folder = vendors.cache() / train_diffusion.RUN.value
    state = train_diffusion.trained(folder)
    autoencoder = AutoencoderKL.from_pretrained(vendors.cache() / train_diffusion.AUTOENCODER.value)
    text_tokenizer = tokenizer.save_tokenizer(vendors.cache() / "tokenizer")
    trainer = diffusion.make_trainer(
        text_tokenizer,
        autoencoder.config.latent_channels,
        model.grid_of(autoencoder),
        torch.device("cpu"),
        diffusion.Settings(),
    )
    trainer.restore(state)
    pipeline = diffusion.finished_pipeline(trainer.average, autoencoder, text_tokenizer)
    out = pathlib.Path(OUT.value)
    size = model.save_pipeline(pipeline, out / "model")
    for judge in ("clip", "instance"):
        if (vendors.cache() / judge / "config.json").exists():
            shutil.copytree(vendors.cache() / judge, out / judge, dirs_exist_ok=True)
    phase = "constant" if trainer.decay_start is None else "decay"
    print(f"{out}/model: {size / 1e6:.1f} MB, {trainer.samples:,} samples, {phase} phase")


if __name__ == "__main__":
    app.run(main)
