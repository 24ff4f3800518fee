"""Put the trained parts together: `python -m perfusion_jax.emoji_world.export_model [--out=FOLDER]`.

Writes the Stable Diffusion folder that ships with the package, in half precision: the text encoder and UNet of the
decay phase (or of the constant phase, if there was no other), and the autoencoder as it is now; and beside it, in
`clip/`, the evaluator.
"""

import pathlib
import shutil

from absl import app, flags
from diffusers import AutoencoderKL

from perfusion_jax.emoji_world import diffusion_training as training
from perfusion_jax.emoji_world import model_folder, tokenizer, torch_training
from perfusion_jax.emoji_world.fetch import cache_directory
from perfusion_jax.runtime import shipped

OUT = flags.DEFINE_string("out", str(shipped.MODEL), "Folder to write.")
RUN = flags.DEFINE_string("run", "diffusion_training", "Folder of the training run under the cache.")


def main(_: list[str]) -> None:
    """Writes the folder and prints its size.

    Raises:
        FileNotFoundError: nothing has been trained yet.
    """
    folder = cache_directory() / RUN.value
    checkpoints = [path for path in (folder / "decaying.pt", folder / "constant.pt") if path.exists()]
    if not checkpoints:
        raise FileNotFoundError(f"{folder}: no checkpoint; run perfusion_jax.emoji_world.pretrain_diffusion first")
    autoencoder = AutoencoderKL.from_pretrained(cache_directory() / "vae")
    text_tokenizer = tokenizer.load_tokenizer(cache_directory() / "tokenizer")
    trainer = training.make_trainer(text_tokenizer, autoencoder.config.latent_channels, training.Settings())
    state = torch_training.load_checkpoint(checkpoints[0])
    assert state is not None
    trainer.restore(state)
    pipeline = training.finished_pipeline(trainer.average, autoencoder, text_tokenizer)
    size = model_folder.save_pipeline(pipeline, pathlib.Path(OUT.value))
    shutil.copytree(cache_directory() / "clip", pathlib.Path(OUT.value).parent / "clip", dirs_exist_ok=True)
    print(f"{OUT.value}: {size / 1e6:.1f} MB, from step {trainer.step} of {checkpoints[0].name}")


if __name__ == "__main__":
    app.run(main)
