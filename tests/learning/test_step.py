"""The training step against the same step written in PyTorch from the paper, and against every known mistake."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_text
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr

from perfusion_jax.config import make_config
from perfusion_jax.learning import step as training
from perfusion_jax.learning.step import Batch, Examples, Settings

SETTINGS = Settings.of(make_config(batch_size=4))
PROMPTS = ["a photo of a <rex>", "the <rex> on the beach", "my <rex>"]
SIDE = 8  # latents


def make_metric(base):
    """A covariance of text encodings and its inverse root: (C, C^-1/2)."""
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((base.model.context_width, base.model.context_width)) / base.model.context_width**0.5
    covariance = factor @ factor.T + 0.1 * np.eye(base.model.context_width)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return covariance, jnp.asarray(eigenvectors / np.sqrt(eigenvalues) @ eigenvectors.T, jnp.float32)


def make_examples(base):
    rng = np.random.default_rng(1)
    shape = (3, 2, SIDE, SIDE, base.model.latent_channels)
    masks = rng.uniform(0, 1, shape[:-1])
    return Examples(
        mean=jnp.asarray(rng.standard_normal(shape), jnp.float32),
        std=jnp.asarray(rng.uniform(0, 0.1, shape), jnp.float32),
        masks=jnp.asarray(masks / masks.max(axis=(2, 3), keepdims=True), jnp.float32),
        sizes=jnp.asarray(rng.integers(0, 100, (3, 6)), jnp.float32),
        prompt_ids=jnp.asarray(np.tile(base.model.tokenizer(PROMPTS, ["<rex>"]), (3, 1, 1))),
        num_pictures=jnp.int32(3),
    )


def make_concept(base, whitening):
    """A concept in the middle of training: nothing is where it started, and s is away from 0 and 1."""
    start = base.new_concept("dog", whitening)
    rng = np.random.default_rng(2)

    def nudge(leaf):
        return leaf + 0.1 * jnp.std(leaf) * jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)

    moved = dataclasses.replace(
        start, embedding=nudge(start.embedding), value_outputs=jax.tree.map(nudge, start.value_outputs)
    )
    return moved.with_target_input(nudge(start.target_input), whitening)


@pytest.fixture(scope="module")
def metric(small_base):
    return make_metric(small_base)


@pytest.fixture(scope="module")
def examples(small_base):
    return make_examples(small_base)


@pytest.fixture(scope="module")
def concept(small_base, metric):
    return make_concept(small_base, metric[1])


@pytest.fixture(scope="module")
def step(small_base, metric):
    """The compiled step, by settings."""

    @functools.cache
    def make(settings):
        return jax.jit(
            lambda examples, learning, key: training.train_step(
                small_base.model, small_base.params, metric[1], examples, learning, key, settings
            )
        )

    return make


def torch_loss_and_gradients(folder, vocabulary_size, concept, batch, covariance, settings, straight_through=False):
    """METHOD's loss in PyTorch: returns loss, gradients by (field, layer), and the mean encoding at the concept."""
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    tensor = partial(torch.tensor, dtype=torch.float32)
    embedding = tensor(np.asarray(concept.embedding), requires_grad=True)
    values = {name: tensor(np.asarray(leaf), requires_grad=True) for name, leaf in concept.value_outputs.items()}
    keys = {name: tensor(np.asarray(leaf), requires_grad=True) for name, leaf in concept.key_outputs.items()}
    encodings, added = torch_text.encode(folder, batch.ids, np.array(batch.sizes), embedding[None])
    placed = torch.from_numpy(np.array(batch.ids) == vocabulary_size)
    mean_encoding = encodings[placed].mean(0)
    target_input = tensor(np.asarray(concept.target_input))
    if straight_through:
        target_input = target_input + mean_encoding - mean_encoding.detach()
    inverse = tensor(np.linalg.inv(covariance))

    def edited(weight, outputs):
        def forward(e, *_):
            similarity = (e @ inverse @ target_input) / (target_input @ inverse @ target_input)
            gate = torch.sigmoid((similarity - settings.bias) / settings.temperature)
            perpendicular = e - similarity[..., None] * target_input
            return perpendicular @ weight.T + gate[..., None] * outputs

        return forward

    for path, module in unet.named_modules():
        if path.endswith("attn2"):
            layer = "/".join(path.replace(".", "/").split("/"))
            for number in range(10):
                layer = layer.replace(f"/{number}", f"_{number}")
            module.to_k.forward = edited(module.to_k.weight, keys[layer])
            module.to_v.forward = edited(module.to_v.weight, values[layer])

    def channels_first(array):
        return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)

    latents, noise = channels_first(batch.latents), channels_first(batch.noise)
    timesteps = torch.from_numpy(np.array(batch.timesteps)).long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    error = (unet(noisy, timesteps, encodings, **added).sample - target).square().mean(1)
    masks = torch.from_numpy(np.array(batch.masks))
    losses = torch.stack([(mask * e).sum() / mask.sum() for mask, e in zip(masks, error, strict=True)])
    if settings.snr_gamma:
        snr = compute_snr(scheduler, timesteps)
        losses = losses * snr.clamp(max=settings.snr_gamma) / (snr + 1 if velocity else snr)
    loss = losses.mean()
    loss.backward()
    gradients = {"embedding": embedding.grad} | {
        f"{field}/{layer}": leaf.grad
        for field, outputs in (("value_outputs", values), ("key_outputs", keys))
        for layer, leaf in outputs.items()
    }
    return loss.item(), gradients, mean_encoding.detach().numpy()


@pytest.mark.parametrize(
    "variant",
    [
        "perfusion",
        *(pytest.param(other, marks=pytest.mark.slow) for other in ("straight_through", "min_snr")),
    ],
)
def test_loss_and_gradients_equal_pytorch(folder, base, variant):
    covariance, whitening = make_metric(base)
    examples, concept = make_examples(base), make_concept(base, whitening)
    straight_through = variant == "straight_through"
    settings = dataclasses.replace(
        SETTINGS,
        straight_through=straight_through,
        snr_gamma=5.0 if variant == "min_snr" else 0.0,
        trained=("embedding", "value_outputs", "key_outputs"),
    )
    batch = training.draw_batch(jax.random.key(3), examples, base.model, settings)
    expected, torch_gradients, torch_encoding = torch_loss_and_gradients(
        folder, base.model.tokenizer.vocabulary_size, concept, batch, covariance, settings, straight_through
    )

    def loss(parameters):
        moved = dataclasses.replace(concept, **parameters)
        return training.loss(base.model, base.params, whitening, moved, batch, settings)

    (ours, encoding), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(concept.trainable(settings.trained))
    assert ours == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(encoding, torch_encoding, atol=1e-4 * np.abs(torch_encoding).max())
    for name, theirs in torch_gradients.items():
        field, _, layer = name.partition("/")
        gradient = gradients[field][layer] if layer else gradients[field]
        assert np.linalg.norm(gradient - theirs.numpy()) <= 1e-3 * np.linalg.norm(theirs.numpy()), name


def test_a_step_moves_values_embedding_and_target_input_but_no_key(step, concept, examples):
    before = training.start(concept, SETTINGS)
    after, _ = step(SETTINGS)(examples, before, jax.random.key(0))
    assert (after.step, bool(after.diverged)) == (1, False)
    for old, new in zip(*map(jax.tree.leaves, (concept.key_outputs, after.concept.key_outputs)), strict=True):
        np.testing.assert_array_equal(old, new)
    # Adam's first step is its learning rate in every coordinate that has a gradient, whatever the gradient's size.
    values = [
        np.abs(new - old)
        for old, new in zip(*map(jax.tree.leaves, (concept.value_outputs, after.concept.value_outputs)), strict=True)
    ]
    assert np.median(np.concatenate(values)) == pytest.approx(SETTINGS.values_rate, rel=0.01)
    moved = np.median(np.abs(after.concept.embedding - concept.embedding))
    assert moved == pytest.approx(SETTINGS.embedding_rate, rel=0.01)


def test_values_without_gradient_do_not_decay(small_base, metric, step, concept, examples):
    """A weight decay at learning rate 0.03 would pull them to zero."""
    settings = dataclasses.replace(SETTINGS, bias=1e3)  # the gate is shut: no gradient reaches the values
    after, _ = step(settings)(examples, training.start(concept, settings), jax.random.key(0))
    for old, new in zip(*map(jax.tree.leaves, (concept.value_outputs, after.concept.value_outputs)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_target_input_moves_once_a_step_towards_the_mean_encoding(
    small_base, metric, step, concept, examples, accumulation
):
    settings = dataclasses.replace(SETTINGS, accumulation=accumulation)
    key = jax.random.key(5)
    before = training.start(concept, settings)
    after, _ = step(settings)(examples, before, key)
    batch = training.draw_batch(jax.random.fold_in(key, 0), examples, small_base.model, settings)
    encodings = np.asarray(
        small_base.model.encode(small_base.params, batch.ids, concept.embedding[None]).tokens,
        np.float64,
    )
    at_concept = encodings[np.asarray(batch.ids) == small_base.model.tokenizer.vocabulary_size]
    assert len(at_concept) == settings.batch_size
    expected = 0.99 * np.asarray(concept.target_input, np.float64) + 0.01 * at_concept.mean(0)
    np.testing.assert_allclose(after.concept.target_input, expected, atol=1e-5 * np.abs(expected).max())
    dual = np.linalg.solve(metric[0], expected)
    np.testing.assert_allclose(after.concept.dual, dual, atol=1e-4 * np.abs(dual).max())


def test_accumulation_changes_memory_and_not_the_result(step, concept, examples):
    results = [
        step(dataclasses.replace(SETTINGS, accumulation=parts))(
            examples, training.start(concept, SETTINGS), jax.random.key(5)
        )
        for parts in (1, 4)
    ]
    assert results[0][1] == pytest.approx(float(results[1][1]), rel=1e-5)
    for one, other in zip(*(jax.tree.leaves(result[0].optimizer) for result in results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(one).max())


def test_the_loss_is_weighted_by_the_mask_and_not_by_its_square_or_its_scale(small_base, metric, examples, concept):
    batch = training.draw_batch(jax.random.key(3), examples, small_base.model, SETTINGS)
    whole = jnp.ones_like(batch.masks)
    left, right = whole.at[:, :, SIDE // 2 :].set(0.0), whole.at[:, :, : SIDE // 2].set(0.0)

    @jax.jit
    def loss(masks: jax.Array) -> jax.Array:
        masked = batch._replace(masks=masks)
        return training.loss(small_base.model, small_base.params, metric[1], concept, masked, SETTINGS)[0]

    np.testing.assert_allclose(loss(left) + loss(right), 2 * loss(whole), rtol=1e-5)
    np.testing.assert_allclose(loss(0.25 * left), loss(left), rtol=1e-5)
    np.testing.assert_allclose(loss(0.75 * left + 0.25 * right), 0.75 * loss(left) + 0.25 * loss(right), rtol=1e-5)


def test_padded_pictures_are_never_drawn(small_base, examples):
    padded = examples._replace(mean=examples.mean.at[2].set(jnp.nan), num_pictures=jnp.int32(2))
    settings = dataclasses.replace(SETTINGS, batch_size=256)
    batch = training.draw_batch(jax.random.key(0), padded, small_base.model, settings)
    assert jnp.isfinite(batch.latents).all()


def test_flips_are_drawn_half_of_the_time_or_never(small_base, examples):
    marked = examples._replace(masks=examples.masks.at[:, 0].set(0.0).at[:, 1].set(1.0))
    settings = dataclasses.replace(SETTINGS, batch_size=512)
    masks = training.draw_batch(jax.random.key(0), marked, small_base.model, settings).masks
    assert masks.mean() == pytest.approx(0.5, abs=0.1)
    masks = training.draw_batch(
        jax.random.key(0), marked, small_base.model, dataclasses.replace(settings, flip=False)
    ).masks
    assert masks.max() == 0


def test_a_concept_that_diverges_is_frozen(step, concept, examples):
    broken = examples._replace(mean=examples.mean.at[:].set(jnp.inf))
    before = training.start(concept, SETTINGS)
    after, value = step(SETTINGS)(broken, before, jax.random.key(0))
    assert not jnp.isfinite(value)
    assert bool(after.diverged)
    again, _ = step(SETTINGS)(examples, after, jax.random.key(0))
    assert bool(again.diverged)
    for state in (after, again):
        for old, new in zip(*map(jax.tree.leaves, (before.concept, state.concept)), strict=True):
            np.testing.assert_array_equal(old, new)
        assert state.step == 0


def test_a_gradient_that_is_not_finite_is_told_by_the_loss(small_base, metric, concept, examples, monkeypatch):
    @jax.custom_vjp
    def poisoned(value):
        return value

    poisoned.defvjp(lambda value: (value, None), lambda _, gradient: (gradient * jnp.inf,))
    true_loss = training.loss
    monkeypatch.setattr(training, "loss", lambda *args: (poisoned(true_loss(*args)[0]), true_loss(*args)[1]))
    before = training.start(concept, SETTINGS)
    after, value = jax.jit(functools.partial(training.train_step, small_base.model, settings=SETTINGS))(
        small_base.params, metric[1], examples, before, jax.random.key(0)
    )
    assert jnp.isnan(value)
    assert bool(after.diverged)


@pytest.mark.slow
def test_training_in_bfloat16_keeps_the_concept_in_float32(small_base, metric, concept, examples):
    losses = []
    for base in (small_base, small_base.astype(jnp.bfloat16)):
        after, value = jax.jit(functools.partial(training.train_step, base.model, settings=SETTINGS))(
            base.params, metric[1], examples, training.start(concept, SETTINGS), jax.random.key(0)
        )
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.concept))
        losses.append(value)
    assert losses[1] == pytest.approx(float(losses[0]), rel=0.05)


@pytest.mark.slow
def test_ablations_train_what_they_say(step, concept, examples):
    def moved(settings):
        after, _ = step(settings)(examples, training.start(concept, settings), jax.random.key(0))
        old, new = concept.trainable(("embedding", "value_outputs", "key_outputs")), after.concept
        return {
            field
            for field, leaves in old.items()
            if any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (leaves, getattr(new, field))), strict=True))
        }

    no_lock = dataclasses.replace(SETTINGS, trained=("embedding", "value_outputs", "key_outputs"))
    assert moved(no_lock) == {"embedding", "value_outputs", "key_outputs"}
    assert moved(dataclasses.replace(SETTINGS, trained=("value_outputs",))) == {"value_outputs"}
    assert moved(dataclasses.replace(SETTINGS, trained=("embedding",))) == {"embedding"}


def test_a_step_depends_on_its_number_and_not_on_what_ran_before(step, concept, examples):
    run = step(SETTINGS)
    state = training.start(concept, SETTINGS)
    states = [state]
    for _ in range(3):
        state, _ = run(examples, state, jax.random.key(7))
        states.append(state)
    again, _ = run(examples, states[2], jax.random.key(7))
    for one, other in zip(*map(jax.tree.leaves, (again, states[3])), strict=True):
        np.testing.assert_array_equal(one, other)


def test_batches_have_the_shapes_they_say(small_base, examples):
    batch = training.draw_batch(jax.random.key(0), examples, small_base.model, SETTINGS)
    assert isinstance(batch, Batch)
    assert batch.latents.shape == (4, SIDE, SIDE, small_base.model.latent_channels)
    assert batch.masks.shape == (4, SIDE, SIDE)
    assert batch.ids.shape == (4, small_base.model.tokenizer.length)
    assert (batch.ids == small_base.model.tokenizer.vocabulary_size).sum() == 4
