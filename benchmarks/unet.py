"""The UNet of Stable Diffusion 1.5, forward and with its gradient: this project against PyTorch diffusers.

    python benchmarks/unet.py [--device cpu|cuda] [--pixels 256] [--batch 1]

A forward pass, and a forward pass with the gradient with respect to a vector that is added to the keys and values of
each cross-attention layer, as a concept's target outputs are. PyTorch's side computes the keys and values in every
pass, ours once before all of them: that is how each is used. Both have the same random weights and inputs, run in turn
in one process, and must agree. On a GPU both compute in bfloat16, PyTorch in channels_last, with its fused attention
and `torch.compile`. Needs PyTorch, 11 GB of memory and 4 GB of disk for a moment.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from side_by_side import Setup, add_flags, compare, print_head, setup, torch_flops

from perfusion_jax import keys_values
from perfusion_jax.base_model import Context
from perfusion_jax.base_model import unet as our_unet
from perfusion_jax.base_model.flax_classes import FlaxUNet2DConditionModel
from perfusion_jax.base_model.weights import find_checkpoint, read_tree

PROMPT_TOKENS = 77
CONTEXT_WIDTH = 768


def make_both(where: Setup) -> tuple[UNet2DConditionModel, FlaxUNet2DConditionModel, dict]:
    """Returns PyTorch's UNet, ours and our weights, equal to PyTorch's."""
    torch.manual_seed(0)
    sizes = {"sample_size": 64, "cross_attention_dim": CONTEXT_WIDTH, "attention_head_dim": 8}
    theirs = UNet2DConditionModel(**sizes)
    module = FlaxUNet2DConditionModel(**sizes, dtype=where.jax_dtype)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        shapes = jax.eval_shape(module.init_weights, jax.random.key(0))
        params = read_tree(find_checkpoint(Path(folder), None), shapes, where.jax_dtype, "unet")
    return where.place(theirs), module, params


def torch_side(
    where: Setup, theirs: UNet2DConditionModel, latents: np.ndarray, encodings: np.ndarray
) -> dict[str, Callable]:
    x = where.tensor(latents).permute(0, 3, 1, 2)  # channels last in memory, as it came
    text, timestep = where.tensor(encodings), torch.tensor([500], device=where.device)
    projections = [m for name, m in theirs.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    # A gradient to zeros that are added is the gradient to the keys and values.
    added = [torch.zeros(m.out_features, device=where.device, dtype=where.torch_dtype) for m in projections]
    for projection, zeros in zip(projections, added, strict=True):
        projection.bias = torch.nn.Parameter(zeros)
    run = where.compiled(theirs)

    def forward() -> np.ndarray:
        with torch.no_grad():
            return run(x, timestep, text).sample.permute(0, 2, 3, 1).float().cpu().numpy()

    def gradient() -> np.ndarray:
        for projection in projections:
            projection.bias.grad = None
        run(x, timestep, text).sample.float().square().mean().backward()
        return np.sqrt(sum(float(m.bias.grad.float().square().sum()) for m in projections))

    return {"forward": forward, "with gradient": gradient}


def jax_side(
    module: FlaxUNet2DConditionModel, params: dict, latents: np.ndarray, encodings: np.ndarray
) -> dict[str, Callable]:
    dtype = module.dtype
    layers = jax.block_until_ready(jax.jit(keys_values)(params, jnp.asarray(encodings, dtype)))
    timestep = jnp.full(len(latents), 500)
    x = jnp.asarray(latents, dtype)

    def denoise(params, layers):
        return our_unet.denoise(module, params, x, timestep, Context(layers)).astype(jnp.float32)

    def squares(biases, params, layers):
        moved = jax.tree.map(lambda array, bias: array + bias.astype(dtype), layers, biases)
        return jnp.mean(denoise(params, moved) ** 2)

    forward, gradient = jax.jit(denoise), jax.jit(jax.grad(squares))
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape[-1:]), layers)

    def norm() -> float:
        return np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient(zeros, params, layers))))

    return {"forward": lambda: np.asarray(forward(params, layers)), "with gradient": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--pixels", type=int, default=256, help="height and width of the picture")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    options = parser.parse_args()
    where = setup(options)

    rng = np.random.default_rng(0)
    side = options.pixels // 8
    latents = rng.standard_normal((options.batch, side, side, 4), dtype=np.float32)
    encodings = rng.standard_normal((options.batch, PROMPT_TOKENS, CONTEXT_WIDTH), dtype=np.float32)
    theirs, module, params = make_both(where)
    flops = torch_flops(lambda: theirs(where.tensor(latents).permute(0, 3, 1, 2), 500, where.tensor(encodings)))
    of_torch = torch_side(where, theirs, latents, encodings)
    of_jax = jax_side(module, params, latents, encodings)

    differences = []
    print_head(where)
    # The gradient to the inputs of a layer costs about what the layer does; none of the weights has one.
    for work, passes in (("forward", 1), ("with gradient", 2)):
        reference, ours = of_torch[work](), of_jax[work]()
        difference = np.abs(ours - reference).max() / np.abs(reference).max()
        if difference > where.agreement:
            sys.exit(f"{work}: the two sides differ by {difference:.1e} of the largest value")
        differences.append(f"{work} {difference:.1e}")
        name = f"{work}, {options.batch} of {options.pixels} pixels"
        compare(where, name, of_jax[work], of_torch[work], passes * flops)
    print(f"\ndifference of the two sides, of the largest value: {', '.join(differences)}")


if __name__ == "__main__":
    main()
