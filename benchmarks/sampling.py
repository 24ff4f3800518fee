"""Drawing whole pictures: this project against PyTorch diffusers' StableDiffusionPipeline.

    python benchmarks/sampling.py                       the embedded model: 4 pictures, 50 DDIM steps
    python benchmarks/sampling.py --sd15                Stable Diffusion 1.5 of random weights: 1 of 256 pixels, 4 steps
    python benchmarks/sampling.py --device cuda --sd15 --pixels 512 --steps 50

Both have the same weights, noise, scheduler and steps, and must draw the same pictures. Each round draws with both, in
turn; compilation is left out. On a GPU both networks compute in bfloat16, PyTorch's in channels_last, with its fused
attention and `torch.compile`. The last lines tell what it saves to compute the keys and values of the prompts once
instead of in every step, as the pipeline does, and how fast both libraries multiply plain matrices there. `--sd15`
needs 15 GB of memory and 5 of disk.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import DDIMScheduler, StableDiffusionPipeline
from side_by_side import Setup, add_flags, compare, print_head, setup, torch_flops

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from checkpoints import save_full_size

from perfusion_jax import keys_values, load_base_model
from perfusion_jax.drawing.denoising import noise_for
from perfusion_jax.drawing.generation import generate
from perfusion_jax.runtime import shipped

PROMPT = "a photo of a dog on the beach"
GUIDANCE = 6.0


def open_pipeline(where: Setup, folder: Path) -> StableDiffusionPipeline:
    """PyTorch's side, as its users run it."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder,
        scheduler=DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.text_encoder, pipeline.vae = where.place(pipeline.text_encoder), where.place(pipeline.vae)
    pipeline.unet = where.compiled(where.place(pipeline.unet))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """The median time of some work, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def product_ratio(where: Setup) -> float:
    """JAX's time for a product of two matrices of 2048 x 2048, in units of PyTorch's."""
    square = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    in_jax, in_torch, multiply = jnp.asarray(square, where.jax_dtype), where.tensor(square), jax.jit(jnp.matmul)

    def theirs() -> None:
        in_torch @ in_torch
        where.wait()

    return seconds(lambda: jax.block_until_ready(multiply(in_jax, in_jax)), 15) / seconds(theirs, 15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument(
        "--sd15", action="store_true", help="the full Stable Diffusion 1.5 instead of the embedded model"
    )
    parser.add_argument("--pixels", type=int, default=0, help="height and width; 256, or the embedded model's own")
    parser.add_argument("--pictures", type=int, default=0, help="drawn at once; 1, or 4 of the embedded model")
    parser.add_argument("--steps", type=int, default=0, help="DDIM steps; 4, or 50 of the embedded model")
    options = parser.parse_args()
    where = setup(options)
    defaults = (256, 1, 4) if options.sd15 else (64, 4, 50)
    given = (options.pixels, options.pictures, options.steps)
    pixels, count, steps = (one or default for one, default in zip(given, defaults, strict=True))
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_full_size(Path(temporary) / "sd15") if options.sd15 else shipped.MODEL
        base = load_base_model(folder, dtype=where.jax_dtype)
        pipeline = open_pipeline(where, folder)
    prompts = [PROMPT] * count
    noise = where.tensor(noise_for(base.model, range(count), pixels, pixels)).permute(0, 3, 1, 2).contiguous()

    def ours() -> np.ndarray:
        size = {"height": pixels, "width": pixels, "batch_size": count}
        return generate(base, prompts, range(count), sampler="ddim", steps=steps, guidance=GUIDANCE, **size)

    def theirs() -> np.ndarray:
        size = {"height": pixels, "width": pixels}
        guided = {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
        return 255 * pipeline(prompts, latents=noise, output_type="np", **guided, **size).images

    difference = np.abs(ours() - theirs())
    # In bfloat16 rounding adds up over the steps, and single pixels at edges differ by much.
    off = difference.max() if where.dtype == "float32" else difference.mean()
    if off > 2:
        sys.exit(f"the two sides draw different pictures: {off:.1f} of 255 apart")
    # torch.compile hides operations from the counter, so the work is counted on modules as they are.
    unet, pipeline.unet = pipeline.unet, getattr(pipeline.unet, "_orig_mod", pipeline.unet)
    flops = torch_flops(theirs)
    pipeline.unet = unet

    print_head(where)
    model = "Stable Diffusion 1.5" if options.sd15 else "embedded model"
    name = f"{model}, {count} of {pixels} pixels, {steps} steps"
    compare(where, name, ours, theirs, flops)
    both = jax.jit(lambda params, encodings: keys_values(params, encodings))
    encodings = base.model.encode(base.params, base.model.tokenizer(prompts + [""] * count)).tokens
    once = seconds(lambda: jax.block_until_ready(both(base.params["unet"], encodings)), where.rounds)
    added = (steps - 1) * once / seconds(ours, where.rounds)
    print(f"\nlargest difference of a pixel: {difference.max():.1f} of 255, mean {difference.mean():.2f}")
    print(f"keys and values once: {once * 1e3:.1f} ms; in every step they would add {added:.1%} to sampling")
    print(f"a product of two matrices of 2048 x 2048: JAX / PyTorch = {product_ratio(where):.2f}")


if __name__ == "__main__":
    main()
