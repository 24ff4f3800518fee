"""The UNet of Stable Diffusion 1.5 at 256 pixels, batch 1, float32, on the CPU: this project against PyTorch diffusers.

    python benchmarks/unet.py

Prints the seconds of a forward pass, and of a forward pass with the gradient with respect to the keys and values
of every cross-attention layer, which is what training a concept computes. PyTorch's side computes the keys and values
in every pass, ours once before all of them: that is how each is used. Both have the same random weights and inputs, run
in turn in one process, and must agree. Needs PyTorch, 11 GB of memory and 4 GB of disk for a moment.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DConditionModel

from perfusion_jax import keys_values
from perfusion_jax.base_model import Context
from perfusion_jax.base_model import unet as our_unet
from perfusion_jax.base_model.flax_classes import FlaxUNet2DConditionModel
from perfusion_jax.base_model.weights import find_checkpoint, read_tree

PROMPT_TOKENS = 77
CONTEXT_WIDTH = 768
AGREEMENT = 1e-4  # of the largest value


def make_both() -> tuple[UNet2DConditionModel, FlaxUNet2DConditionModel, dict]:
    """Returns PyTorch's UNet, ours and our weights, equal to PyTorch's."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(sample_size=64, cross_attention_dim=CONTEXT_WIDTH, attention_head_dim=8)
    theirs.eval().requires_grad_(False)
    module = FlaxUNet2DConditionModel(sample_size=64, cross_attention_dim=CONTEXT_WIDTH, attention_head_dim=8)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        shapes = jax.eval_shape(module.init_weights, jax.random.key(0))
        params = read_tree(find_checkpoint(Path(folder), None), shapes, jnp.float32, "unet")
    return theirs, module, params


def torch_side(theirs: UNet2DConditionModel, latents: np.ndarray, encodings: np.ndarray) -> dict[str, Callable]:
    x = torch.from_numpy(latents).permute(0, 3, 1, 2).contiguous()
    text, timestep = torch.from_numpy(encodings), torch.tensor([500])
    projections = [m for name, m in theirs.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    fed: list[torch.Tensor] = []

    def cut(module, inputs, output):
        fed.append(output.detach().requires_grad_())
        return fed[-1]

    def forward() -> np.ndarray:
        with torch.no_grad():
            return theirs(x, timestep, text).sample.permute(0, 2, 3, 1).numpy()

    def gradient() -> np.ndarray:
        fed.clear()
        hooks = [projection.register_forward_hook(cut) for projection in projections]
        theirs(x, timestep, text).sample.square().mean().backward()
        for hook in hooks:
            hook.remove()
        return np.sqrt(sum(float(tensor.grad.square().sum()) for tensor in fed))

    return {"forward": forward, "with gradient": gradient}


def jax_side(
    module: FlaxUNet2DConditionModel, params: dict, latents: np.ndarray, encodings: np.ndarray
) -> dict[str, Callable]:
    fed = jax.block_until_ready(Context(jax.jit(keys_values)(params, encodings)))
    timestep = jnp.array([500])

    def denoise(params, fed):
        return our_unet.denoise(module, params, jnp.asarray(latents), timestep, fed)

    forward = jax.jit(denoise)
    gradient = jax.jit(jax.grad(lambda fed, params: jnp.mean(denoise(params, fed) ** 2)))

    def norm() -> float:
        return np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient(fed, params))))

    return {"forward": lambda: np.asarray(forward(params, fed)), "with gradient": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one that is not counted")
    parser.add_argument("--pixels", type=int, default=256, help="height and width of the picture")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    side = options.pixels // 8
    latents = rng.standard_normal((1, side, side, 4), dtype=np.float32)
    encodings = rng.standard_normal((1, PROMPT_TOKENS, CONTEXT_WIDTH), dtype=np.float32)
    theirs, module, params = make_both()
    sides = {"torch": torch_side(theirs, latents, encodings), "jax": jax_side(module, params, latents, encodings)}

    print(f"PyTorch {torch.__version__}, JAX {jax.__version__}, {os.cpu_count()} cores, {options.pixels} pixels")
    print("medians of seconds, and of the ratio round by round")
    print(f"{'work':<16}{'PyTorch s':>12}{'JAX s':>12}{'JAX / PyTorch':>16}{'difference':>12}")
    for work in ("forward", "with gradient"):
        outputs = {name: functions[work]() for name, functions in sides.items()}  # compiles and warms up
        difference = np.abs(outputs["jax"] - outputs["torch"]).max() / np.abs(outputs["torch"]).max()
        if difference > AGREEMENT:
            sys.exit(f"{work}: the two sides differ by {difference:.1e} of the largest value")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, functions in sides.items():
                start = time.perf_counter()
                functions[work]()
                seconds[name].append(time.perf_counter() - start)
        ratios = [ours / reference for ours, reference in zip(seconds["jax"], seconds["torch"], strict=True)]
        torch_median, jax_median = (statistics.median(seconds[name]) for name in ("torch", "jax"))
        print(
            f"{work:<16}{torch_median:>12.2f}{jax_median:>12.2f}{statistics.median(ratios):>16.2f}{difference:>12.1e}"
        )


if __name__ == "__main__":
    main()
