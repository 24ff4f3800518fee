"""Sampling beside PyTorch diffusers' StableDiffusionPipeline: same weights, noise, scheduler and steps, on the CPU.

    python benchmarks/sampling.py            the embedded model: 4 pictures, 50 DDIM steps
    python benchmarks/sampling.py --sd15     Stable Diffusion 1.5, random weights, 256 pixels, 1 picture, 4 DDIM steps

Each round draws with both, in turn; compilation is left out. The last lines tell what it saves to compute the keys and
values of the prompts once instead of in every step, as the pipeline does, and how fast both libraries multiply plain
matrices on this processor. `--sd15` needs 15 GB of memory and 5 of disk.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from absl import app, flags
from diffusers import DDIMScheduler, StableDiffusionPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from checkpoints import save_full_size

from perfusion_jax import keys_values, load_base_model
from perfusion_jax.drawing.denoising import noise_for
from perfusion_jax.drawing.generation import generate
from perfusion_jax.runtime import shipped

SD15 = flags.DEFINE_bool("sd15", False, "The full Stable Diffusion 1.5 instead of the embedded model.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds that count; one before them does not.")


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_full_size(Path(temporary) / "sd15") if SD15.value else shipped.MODEL
        base = load_base_model(folder)
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            scheduler=DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    count, steps, side = (1, 4, 256) if SD15.value else (4, 50, 64)
    prompts = ["a photo of a dog on the beach"] * count
    noise = torch.from_numpy(np.asarray(noise_for(base.model, range(count), side, side)).transpose(0, 3, 1, 2).copy())

    def ours() -> np.ndarray:
        return generate(
            base, prompts, range(count), steps=steps, guidance=6.0, height=side, width=side, batch_size=count
        )

    def theirs() -> np.ndarray:
        options = {"num_inference_steps": steps, "guidance_scale": 6.0, "height": side, "width": side}
        return 255 * pipeline(prompts, latents=noise, output_type="np", **options).images

    print(f"largest difference of a pixel: {np.abs(ours() - theirs()).max():.1f} of 255")
    both = jax.jit(lambda params, encodings: keys_values(params, encodings))
    encodings = base.model.encode(base.params, base.model.tokenizer(prompts + [""] * count)).tokens
    square = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    in_jax, in_torch, multiply = jax.numpy.asarray(square), torch.from_numpy(square), jax.jit(jax.numpy.matmul)
    works: dict[str, Callable[[], object]] = {
        "ours": ours,
        "theirs": theirs,
        "keys and values": lambda: jax.block_until_ready(both(base.params["unet"], encodings)),
        "our product": lambda: jax.block_until_ready(multiply(in_jax, in_jax)),
        "their product": lambda: in_torch @ in_torch,
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(ROUNDS.value + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - start)
    ours_s, theirs_s, fed_s, product, their_product = (float(np.median(times)) for times in seconds.values())
    ratio = float(np.median(np.array(seconds["ours"]) / np.array(seconds["theirs"])))
    print("| sampling | PyTorch, s | JAX, s | JAX / PyTorch |\n| --- | --- | --- | --- |")
    model = "Stable Diffusion 1.5" if SD15.value else "embedded model"
    print(f"| {model}, {count} of {side} pixels, {steps} steps | {theirs_s:.2f} | {ours_s:.2f} | {ratio:.2f} |")
    saved = (steps - 1) * fed_s
    print(f"keys and values once: {fed_s * 1e3:.1f} ms; in every step they would add {saved / ours_s:.1%} to sampling")
    print(f"a product of two matrices of 2048 x 2048: JAX / PyTorch = {product / their_product:.2f}")


if __name__ == "__main__":
    app.run(main)
