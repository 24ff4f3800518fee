"""A whole optimiser step, of 1 and of 16 concepts: this project against the same step written in PyTorch.

    python benchmarks/train_step.py                     the embedded model, 64 pixels
    python benchmarks/train_step.py --sd15              Stable Diffusion 1.5 of random weights, 512 pixels (--pixels)
    python benchmarks/train_step.py --device cuda --sd15

A step encodes the prompts with the concept's word embedding, edits keys and values, predicts the noise, takes the
masked loss and its gradient to the embedding and to the target outputs of all layers, and moves them by Adam and i* by
its average. PyTorch's side computes the edit of a prompt once for all layers, as ours does, and learns concepts one
after the other; ours learns them at once. Both take the same batch once, and must agree on the loss and on the gradient
to the embedding. On a GPU both networks compute in bfloat16, PyTorch's in channels_last, with its fused attention and
`torch.compile`. `--sd15` needs 15 GB of memory and 5 of disk.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from side_by_side import Setup, add_flags, compare, print_head, setup, torch_flops

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from checkpoints import save_full_size
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from perfusion_jax import load_base_model
from perfusion_jax.base_model import BaseModel
from perfusion_jax.config import make_config
from perfusion_jax.data.examples import Examples
from perfusion_jax.learning import step as training
from perfusion_jax.learning.fleet_step import Members, make_fleet_step, step_components
from perfusion_jax.learning.step import Batch, Settings
from perfusion_jax.pod.mesh import make_mesh, place
from perfusion_jax.runtime import shipped

PICTURES, PROMPTS = 5, ["a photo of a <concept>", "the <concept> on the beach"]


class EditedProjection(torch.nn.Module):
    """W of a prompt whose last channel is the gate: W e_perp + gate o*."""

    def __init__(self, weight: torch.Tensor, outputs: torch.Tensor):
        super().__init__()
        self.weight, self.outputs = weight, outputs

    def forward(self, edited: torch.Tensor) -> torch.Tensor:
        dense = torch.nn.functional.linear(edited[..., :-1], self.weight)
        return dense + edited[..., -1:] * self.outputs.to(dense.dtype)


class TorchStep:
    """The step in PyTorch, from the paper's formulas; one concept."""

    def __init__(self, where: Setup, folder: Path, inverse: np.ndarray, settings: Settings):
        self.where, self.settings = where, settings
        self.text_encoder = where.place(CLIPTextModel.from_pretrained(folder / "text_encoder"))
        self.scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        self.unet = where.place(UNet2DConditionModel.from_pretrained(folder / "unet"))
        self.inverse = torch.tensor(inverse, dtype=torch.float32, device=where.device)
        self.run = where.compiled(self.unet)

    def begin(self, concept: Any) -> None:
        """Starts with a concept of ours."""
        parameter = partial(torch.tensor, dtype=torch.float32, device=self.where.device)
        self.embedding = torch.nn.Parameter(parameter(np.asarray(concept.embedding)))
        self.target_input = parameter(np.asarray(concept.target_input))
        values = []
        for path, module in self.unet.named_modules():
            if path.endswith("attn2"):
                layer = "/".join(path.split(".")).replace("/to_out", "")
                for number in range(10):
                    layer = layer.replace(f"/{number}", f"_{number}")
                value = torch.nn.Parameter(parameter(np.asarray(concept.value_outputs[layer])))
                key = parameter(np.asarray(concept.key_outputs[layer]))
                module.to_k = EditedProjection(module.to_k.weight, key)
                module.to_v = EditedProjection(module.to_v.weight, value)
                values.append(value)
        rates = {"embedding_rate": [self.embedding], "values_rate": values}
        self.optimizer = torch.optim.Adam(
            [{"params": given, "lr": getattr(self.settings, rate)} for rate, given in rates.items()],
            **({"fused": True} if self.where.device == "cuda" else {}),
        )

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch, and the mean encoding at the concept's token."""
        tensor, settings = self.where.tensor, self.settings
        ids = tensor(batch.ids).long()
        placed = ids == self.text_encoder.config.vocab_size
        table = self.text_encoder.text_model.embeddings.token_embedding
        hook = table.register_forward_hook(
            lambda module, inputs, rows: torch.where(placed[..., None], self.embedding.to(rows.dtype), rows)
        )
        encodings = self.text_encoder(torch.where(placed, 0, ids)).last_hidden_state.float()
        hook.remove()
        mean_encoding = encodings[placed].mean(0)
        dual = self.inverse @ self.target_input
        similarity = (encodings @ dual) / (self.target_input @ dual)
        gate = torch.sigmoid((similarity - settings.bias) / settings.temperature)
        perpendicular = encodings - similarity[..., None] * self.target_input
        edited = torch.cat([perpendicular, gate[..., None]], dim=-1).to(self.where.torch_dtype)
        latents, noise = (tensor(array).permute(0, 3, 1, 2).float() for array in (batch.latents, batch.noise))
        timesteps = tensor(batch.timesteps).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps).to(self.where.torch_dtype)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        error = (self.run(noisy, timesteps, edited).sample.float() - target).square().mean(1)
        masks = tensor(batch.masks).float()
        per_sample = (masks * error).sum((1, 2)) / masks.sum((1, 2))
        return per_sample.mean(), mean_encoding

    def __call__(self, batch: Batch) -> float:
        """Takes a step."""
        self.optimizer.zero_grad()
        loss, mean_encoding = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        decay = self.settings.target_input_decay
        self.target_input = decay * self.target_input + (1 - decay) * mean_encoding.detach()
        return loss.item()


def make_examples(base: BaseModel, side: int) -> Examples:
    rng = np.random.default_rng(0)
    shape = (PICTURES, 2, side, side, base.model.latent_channels)
    return Examples(
        mean=jnp.asarray(rng.standard_normal(shape), jnp.float32),
        std=jnp.full(shape, 0.05, jnp.float32),
        masks=jnp.ones(shape[:-1], jnp.float32),
        sizes=jnp.zeros((PICTURES, 6), jnp.float32),
        prompt_ids=jnp.asarray(np.tile(base.model.tokenizer(PROMPTS, ["<concept>"]), (PICTURES, 1, 1))),
        num_pictures=jnp.int32(PICTURES),
    )


def our_steps(
    base: BaseModel, whitening: jax.Array, examples: Examples, settings: Settings, count: int
) -> Iterator[Any]:
    """Takes a step of `count` concepts at once, again and again."""
    mesh = make_mesh((1, 1), jax.devices()[:1])
    concept = base.new_concept("dog", whitening)
    many = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * count), training.start(concept, settings))
    keys = jax.vmap(lambda number: jax.random.key_data(jax.random.key(number)))(jnp.arange(count))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), examples)
    members = Members(stacked, keys, jnp.full(count, 2**30, jnp.int32))
    params = place({name: base.params[name] for name in step_components(base.model)}, mesh)
    step = make_fleet_step(base.model, settings, mesh)
    while True:
        many, losses = step(params, whitening, members, many)
        yield np.asarray(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument(
        "--sd15", action="store_true", help="the full Stable Diffusion 1.5 instead of the embedded model"
    )
    parser.add_argument("--pixels", type=int, default=0, help="height and width of the pictures; the model's own")
    parser.add_argument("--batch", type=int, default=4, help="samples of a concept's step")
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    where = setup(options)
    settings = Settings.of(make_config(batch_size=options.batch))
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_full_size(Path(temporary) / "sd15") if options.sd15 else shipped.MODEL
        base = load_base_model(folder, dtype=where.jax_dtype)
        width = base.model.context_width
        factor = np.random.default_rng(1).standard_normal((width, 2 * width)) / (2 * width) ** 0.5
        covariance = factor @ factor.T
        theirs = TorchStep(where, folder, np.linalg.inv(covariance), settings)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    whitening = jnp.asarray((eigenvectors / np.sqrt(eigenvalues)) @ eigenvectors.T, jnp.float32)
    pixels = options.pixels or base.model.picture_side
    examples = make_examples(base, pixels // base.model.vae_factor)
    concept = base.new_concept("dog", whitening)
    theirs.begin(concept)

    batch = training.draw_batch(jax.random.key(0), examples, base.model, settings)
    expected, _ = theirs.loss(batch)
    expected.backward()
    gradient = theirs.embedding.grad.cpu().numpy()

    def loss(parameters: dict[str, Any], params: Any) -> Any:
        moved = type(concept)(**{**vars(concept), **parameters})
        return training.loss(base.model, params, whitening, moved, batch, settings)[0]

    trained = concept.trainable(settings.trained)
    ours, gradients = jax.jit(jax.value_and_grad(loss))(trained, base.params)
    off = abs(float(ours) / expected.item() - 1)
    apart = np.linalg.norm(gradients["embedding"] - gradient) / np.linalg.norm(gradient)
    if max(off, apart / 10) > where.agreement:
        sys.exit(f"the two sides differ: the loss by {off:.1e}, the gradient to the embedding by {apart:.1e}")

    flops = torch_flops(lambda: theirs(batch))
    print_head(where)
    for count in options.concepts:
        step = our_steps(base, whitening, examples, settings, count)

        def of_torch(count: int = count) -> None:
            for _ in range(count):
                theirs(batch)

        name = f"{count} concept{'s' * (count > 1)} x {options.batch} of {pixels} pixels"
        compare(where, name, partial(next, step), of_torch, count * flops)
    print(f"\ndifference of the two sides: of the loss {off:.1e}, of the gradient to the embedding {apart:.1e}")


if __name__ == "__main__":
    main()
