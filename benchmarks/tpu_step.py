"""The training step of Stable Diffusion 1.5 at 512 pixels, compiled for TPUs that are not there.

    python benchmarks/tpu_step.py [--topology v5e:2x4] [--only NAME ...]

Prints, per chip, what the TPU compiler tells of this project's fleet step (text encoder, UNet, gradient and optimiser,
bfloat16), and of the UNet of diffusers-Flax as it is, with its gradient to the text encodings: work, traffic of the
HBM, bytes that operations access there and in vector memory, and memory. Nothing runs, so there are no times. Needs
`pip install perfusion_jax[tpu]` and minutes for each line.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from perfusion_jax.base_model import Architecture, load_architecture
from perfusion_jax.base_model.flax_classes import FlaxUNet2DConditionModel
from perfusion_jax.config import make_config
from perfusion_jax.learning.forecast import compile_step, topology_devices
from perfusion_jax.learning.step import Settings
from perfusion_jax.pod import hlo_report
from perfusion_jax.pod.chips import find_chip
from perfusion_jax.pod.hlo_report import ProgramReport
from perfusion_jax.pod.mesh import make_mesh

# (name, concepts per chip, samples of each); stock has no concepts.
OURS = {"ours 1x4": (1, 4), "ours 1x16": (1, 16), "ours 16x1": (16, 1)}
STOCK = "diffusers-Flax 4"
PIXELS, TEMPLATES = 512, 9


def stable_diffusion(folder: Path) -> Architecture:
    """The architecture of Stable Diffusion 1.5; the tokeniser is a stand-in of four tokens."""
    widths = [320, 640, 1280, 1280]
    configs = {
        "model_index.json": {
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": widths,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "latent_channels": 4,
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "vocab_size": 49408,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        "scheduler/scheduler_config.json": {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
        },
        "tokenizer/vocab.json": {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3},
        "tokenizer/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77},
    }
    for name, config in configs.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(config))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    return load_architecture(folder, dtype=jnp.dtype(jnp.bfloat16))


def stock(model: Architecture, device: jax.Device, samples: int) -> ProgramReport:
    """The UNet of diffusers-Flax with its gradient to the text encodings, on one chip."""
    mesh = Mesh(np.array([device]), ("chip",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    module = FlaxUNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, dtype=jnp.dtype(jnp.bfloat16)
    )

    def loss(encodings, params, latents, timesteps, target):
        prediction = module.apply({"params": params}, latents, timesteps, encodings).sample
        return jnp.mean((prediction.astype(jnp.float32) - target) ** 2)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((samples, *shape), dtype)

    step = jax.jit(jax.value_and_grad(loss), in_shardings=everywhere, out_shardings=everywhere)
    latents = array(4, 64, 64)
    lowered = step.lower(array(77, 768), model.shapes["unet"], latents, array(dtype=jnp.int32), latents)
    return hlo_report.report(lowered.compile(), dict(mesh.shape), find_chip(device.device_kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--only", nargs="+", choices=[STOCK, *OURS], default=[STOCK, *OURS], help="lines of the table")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    devices = topology_devices(options.topology)
    mesh = make_mesh((-1, 1), devices)
    print(f"{options.topology}, {devices[0].device_kind}; TFLOP and GB per chip and step")
    headings = "".join(f"{heading:>13}" for heading in ("traffic", "accessed", "temporaries", "peak"))
    print(f"{'step':<20}{'TFLOP':>8}{headings}  collectives")
    with tempfile.TemporaryDirectory() as folder:
        model = stable_diffusion(Path(folder))
        for name in options.only:
            if name == STOCK:
                found = stock(model, devices[0], samples=4)
            else:
                concepts, samples = OURS[name]
                members = concepts * len(devices)
                found = compile_step(
                    model, Settings.of(make_config("sd15", batch_size=samples)), mesh, members, PIXELS, TEMPLATES
                )
            gigabytes = [figure / 1e9 for figure in (found.traffic, found.accessed, found.temporaries, found.peak)]
            print(
                f"{name:<20}{found.flops / 1e12:>8.2f}{''.join(f'{figure:>13.2f}' for figure in gigabytes)}"
                f"  {found.collectives or 'none'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
