"""The step of other methods against PyTorch diffusers: their losses, and the gradients of all that they train."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_text
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from peft import LoraConfig

from perfusion_jax.config import make_config
from perfusion_jax.data.examples import Examples
from perfusion_jax.formats.concept_file import by_name
from perfusion_jax.learning import step as training
from perfusion_jax.learning.step import Settings
from perfusion_jax.method import baselines
from perfusion_jax.method.baselines import BASELINES

RANK, BATCH = 2, 3
PRIOR_WEIGHT = 0.7
SIDE = 8  # latents


def make_examples(base, prompts, seed):
    rng = np.random.default_rng(seed)
    shape = (2, 2, SIDE, SIDE, base.model.latent_channels)
    return Examples(
        mean=jnp.asarray(rng.standard_normal(shape), jnp.float32),
        std=jnp.zeros(shape),
        masks=jnp.ones(shape[:-1]),
        sizes=jnp.asarray(rng.integers(0, 100, (2, 6)), jnp.float32),
        prompt_ids=jnp.asarray(np.tile(base.model.tokenizer(prompts, ["<rex>"]), (2, 1, 1))),
        num_pictures=jnp.int32(2),
    )


def settings_of(method):
    prior = 2 if method in ("custom_diffusion", "dreambooth") else 0
    config = make_config(
        method=method,
        batch_size=BATCH,
        rank=RANK,
        prior_pictures=prior,
        prior_weight=PRIOR_WEIGHT,
        train_embedding=True,
    )
    return Settings.of(config)


def in_the_middle(base, method):
    """What a method has in the middle of training."""
    embedding = base.super_category_embedding("dog")
    learnt = baselines.begin(method, base.params["unet"], embedding, jax.random.key(0), RANK)
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda leaf: leaf + 0.02 * jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), learnt)


def as_torch(learnt):
    """By the names of a file: kernels of linear layers and convolutions as PyTorch lays them out."""
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}
    return {
        name: torch.from_numpy(np.array(leaf).transpose(axes.get(np.ndim(leaf), range(np.ndim(leaf))))).contiguous()
        for name, leaf in by_name(learnt).items()
    }


def torch_loss_and_gradients(folder, vocabulary_size, method, learnt, batch, prior_weight):
    """What diffusers' script of the method computes; gradients by the names of a file."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    parts = as_torch(learnt)
    embedding = parts["embedding"].requires_grad_()
    trained = {"embedding": embedding}
    if method == "lora":
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r".*attn2\.to_[kv]"))
        for name, part in parts.items():
            field, _, path = name.partition(".")
            if path:
                layer = unet.get_submodule(path.removesuffix(".kernel"))
                matrix = {"down": layer.lora_A, "up": layer.lora_B}[field]["default"].weight
                matrix.data = part
                trained[name] = matrix
    elif method == "custom_diffusion":
        processors = {}
        for name in unet.attn_processors:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            crosses = "attn2" in name
            width = unet.config.cross_attention_dim if crosses else None
            processor = CustomDiffusionAttnProcessor(
                train_kv=crosses, train_q_out=False, hidden_size=attention.to_q.out_features, cross_attention_dim=width
            )
            if crosses:
                for letter in "kv":
                    weights = getattr(processor, f"to_{letter}_custom_diffusion")
                    key = f"added.{name.removesuffix('.processor')}.to_{letter}.kernel"
                    weights.weight.data = getattr(attention, f"to_{letter}").weight.data + parts[key]
                    trained[key] = weights.weight
            processors[name] = processor
        unet.set_attn_processor(processors)
    elif method == "dreambooth":
        theirs = {
            f"added.{name.removesuffix('.weight')}.{'kernel' if value.ndim > 1 else 'scale'}"
            if name.endswith(".weight")
            else f"added.{name}": value
            for name, value in unet.named_parameters()
        }
        assert theirs.keys() == parts.keys() - {"embedding"}
        for name, weights in theirs.items():
            weights.data = weights.data + parts[name]
        trained |= theirs

    encodings, added = torch_text.encode(folder, batch.ids, np.array(batch.sizes), embedding[None])

    def channels_first(array):
        return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)

    latents, noise = channels_first(batch.latents), channels_first(batch.noise)
    timesteps = torch.from_numpy(np.array(batch.timesteps)).long()
    prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, encodings, **added).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    if prior_weight:
        (prediction, prior), (target, of_prior) = prediction.chunk(2), target.chunk(2)
        loss = torch.nn.functional.mse_loss(prediction, target)
        loss = loss + prior_weight * torch.nn.functional.mse_loss(prior, of_prior)
    else:
        loss = torch.nn.functional.mse_loss(prediction, target)
    loss.backward()
    return loss.item(), {name: part.grad for name, part in trained.items()}


@pytest.mark.parametrize("method", BASELINES)
def test_loss_and_gradients_equal_diffusers(small_folder, small_base, method):
    check_loss_and_gradients(small_folder, small_base, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", BASELINES)
def test_loss_and_gradients_equal_diffusers_in_every_layout(folder, base, method):
    check_loss_and_gradients(folder, base, method)


def check_loss_and_gradients(folder, base, method):
    settings, learnt = settings_of(method), in_the_middle(base, method)
    batches = [training.draw_batch(jax.random.key(3), make_examples(base, ["a <rex> dog"], 1), base.model, settings)]
    if settings.prior_pictures:
        of_prior = make_examples(base, ["a photo of a dog"], 2)
        batches.append(training.draw_batch(jax.random.key(4), of_prior, base.model, settings))
    batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)
    weight = PRIOR_WEIGHT if settings.prior_pictures else 0.0
    expected, theirs = torch_loss_and_gradients(
        folder, base.model.tokenizer.vocabulary_size, method, learnt, batch, weight
    )

    def loss(parameters):
        moved = dataclasses.replace(learnt, **parameters)
        return training.loss(base.model, base.params, None, moved, batch, settings)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(learnt.trainable(settings.trained))
    assert value == pytest.approx(expected, rel=1e-4)
    ours = as_torch(dataclasses.replace(learnt, **gradients))
    assert ours.keys() == theirs.keys()
    scale = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        # A bias before a group's normalisation has no gradient but rounding.
        assert (ours[name] - gradient).norm() <= 2e-3 * gradient.norm() + 1e-6 * scale, name


@pytest.fixture(scope="module")
def take():
    """The compiled step."""
    return jax.jit(training.train_step, static_argnames=("model", "settings"))


def before_learning(base, method):
    learnt = baselines.begin(method, base.params["unet"], base.super_category_embedding("dog"), jax.random.key(0), RANK)
    settings = dataclasses.replace(settings_of(method), accumulation=3, embedding_rate=0.01, weights_rate=0.001)
    examples = make_examples(base, ["a <rex> dog"], 1)
    if settings.prior_pictures:
        examples = examples._replace(prior=make_examples(base, ["a photo of a dog"], 2))
    return settings, examples, training.start(learnt, settings)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "dreambooth" else pytest.mark.slow) for name in BASELINES]
)
def test_a_step_moves_what_the_method_trains(small_base, take, method):
    settings, examples, before = before_learning(small_base, method)
    after, _ = take(small_base.model, small_base.params, None, examples, before, jax.random.key(0), settings)
    assert (int(after.step), bool(after.diverged)) == (1, False)
    for field, moved in after.concept.trainable(settings.trained).items():
        old = getattr(before.concept, field)
        steps = np.concatenate(
            [np.abs(leaf).ravel() for leaf in jax.tree.leaves(jax.tree.map(jnp.subtract, moved, old))]
        )
        # Adam's first step is its learning rate. A LoRA's second factors are zero: the first ones have no gradient yet.
        expected = {"embedding": 0.01, "down": 0.0}.get(field, 0.001)
        assert np.median(np.concatenate(jax.tree.leaves(steps))) == pytest.approx(expected, rel=0.01), field


@pytest.mark.slow
def test_accumulation_changes_memory_and_not_the_result_with_a_prior(small_base, take):
    settings, examples, before = before_learning(small_base, "custom_diffusion")
    results = []
    for accumulation in (1, 3):
        own = dataclasses.replace(settings, accumulation=accumulation)
        results.append(take(small_base.model, small_base.params, None, examples, before, jax.random.key(0), own))
    (one, loss), (other, again) = results
    assert again == pytest.approx(float(loss), rel=1e-5)
    for whole, parts in zip(*map(jax.tree.leaves, (one.optimizer, other.optimizer)), strict=True):
        np.testing.assert_allclose(whole, parts, rtol=1e-3, atol=1e-4 * np.abs(whole).max())
