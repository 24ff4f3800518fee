"""Learning one concept: the loss, and one step of optimisation (Perfusion, arXiv 2305.01644, section 4 and appendix).

The methods that it is compared with (`method.baselines`) take the same step, with other parameters and no i*.

Everything here is written for one concept and is a pure function of its arguments: `jax.vmap` makes a fleet of it.

    o*_V, embedding    parameters, each with its own learning rate (Adam, no weight decay)
    i*                 state: i* <- d i* + (1 - d) mean over the batch of the encodings at the concept's token
    o*_K               locked: what the frozen W_K gives for the super-category
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32, Key
from ml_collections import ConfigDict

from perfusion_jax.base_model import Architecture, Context, Encoding
from perfusion_jax.base_model.text import mean_at
from perfusion_jax.data.examples import Examples
from perfusion_jax.method.baselines import BASELINES, Learnt, add
from perfusion_jax.method.concept import Concept
from perfusion_jax.method.edit import Gate
from perfusion_jax.method.surgery import Params, insert


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a concept is learnt. Hashable: a static argument of the compiled step.

    Attributes:
        batch_size: samples per optimiser step.
        accumulation: parts that a batch is computed in, one after the other; divides `batch_size`.
        method: `perfusion`, or a key of `method.baselines.BASELINES`.
        rank: of a LoRA.
        values_rate: learning rate of o*_V.
        embedding_rate: learning rate of the word embedding.
        weights_rate: learning rate of what other methods add to the UNet's weights.
        bias, temperature: beta and tau of the gate while training.
        target_input_decay: d, of the moving average of i*.
        flip: show each sample mirrored with probability 1/2.
        trained: the fields of the concept that are parameters; `key_outputs` among them takes the lock off.
        prior_pictures: how many pictures of its kind, drawn by the frozen model, are learnt beside a concept's own
            (prior preservation: DreamBooth, arXiv 2208.12242, section 3.2); as many samples a step as of its own.
        prior_weight: of their loss.
        snr_gamma: of min-SNR weights of the loss; 0: every timestep counts alike.
        straight_through: let the gradient pass through i* as if it were the batch's mean encoding.
    """

    method: str
    batch_size: int
    accumulation: int
    rank: int
    values_rate: float
    embedding_rate: float
    weights_rate: float
    bias: float
    temperature: float
    target_input_decay: float
    flip: bool
    trained: tuple[str, ...]
    prior_pictures: int
    prior_weight: float
    snr_gamma: float
    straight_through: bool

    @classmethod
    def of(cls, config: ConfigDict) -> "Settings":
        """The part of a config that the step knows."""
        fields = {"embedding": config.train_embedding}
        if config.method in BASELINES:
            fields |= {field.name: True for field in dataclasses.fields(BASELINES[config.method])[1:]}
        else:
            fields |= {"value_outputs": config.train_values, "key_outputs": not config.lock_keys}
        trained = tuple(field for field, is_trained in fields.items() if is_trained)
        same = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name != "trained"}
        return cls(**same, trained=trained)


class Batch(NamedTuple):
    """Samples of one step, or of a part of it.

    Attributes:
        latents: float32 [batch, height, width, channels].
        masks: weights of the loss, float32 [batch, height, width].
        sizes: of the pictures, before and after they were fitted, float32 [batch, 6] (`unet.Added`).
        ids: int32 [batch, tokens].
        noise: standard normal, the shape of the latents.
        timesteps: int32 [batch].
    """

    latents: Float32[Array, "*parts batch height width channels"]
    masks: Float32[Array, "*parts batch height width"]
    sizes: Float32[Array, "*parts batch sizes"]
    ids: Int32[Array, "*parts batch tokens"]
    noise: Float32[Array, "*parts batch height width channels"]
    timesteps: Int32[Array, "*parts batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learning:
    """A concept while it is learnt: all that changes from step to step.

    Attributes:
        concept: as far as it has been learnt.
        optimizer: optax's state.
        step: optimiser steps taken, int32 scalar.
        diverged: whether a loss or gradient was not finite; from then on nothing changes. Bool scalar.
    """

    concept: Learnt
    optimizer: Any
    step: Int32[Array, "*slots"]
    diverged: Bool[Array, "*slots"]


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Adam without weight decay, at one rate for the embedding and another for target outputs, or weights."""
    others = settings.weights_rate if settings.method in BASELINES else settings.values_rate
    return optax.multi_transform(
        {"embedding": optax.adam(settings.embedding_rate), "others": optax.adam(others)},
        lambda trained: {field: "embedding" if field == "embedding" else "others" for field in trained},
    )


def start(concept: Learnt, settings: Settings) -> Learning:
    """The state before the first step, of a concept that has learnt nothing (`BaseModel.new_concept`)."""
    return Learning(
        concept=concept,
        optimizer=make_optimizer(settings).init(concept.trainable(settings.trained)),
        step=jnp.zeros((), jnp.int32),
        diverged=jnp.zeros((), bool),
    )


def draw_batch(key: Key[Array, ""], examples: Examples, model: Architecture, settings: Settings) -> Batch:
    """Draws the samples of a step: pictures, flips, prompts, latents of the posterior, noise and timesteps.

    Args:
        key: of this step.
        examples: what to draw from.
        model: for its schedule.
        settings: batch size and flips.
    """
    keys = jax.random.split(key, 6)
    size = settings.batch_size
    pictures = jax.random.randint(keys[0], (size,), 0, examples.num_pictures)
    flips = jax.random.bernoulli(keys[1], 0.5, (size,)).astype(jnp.int32) * settings.flip
    prompts = jax.random.randint(keys[2], (size,), 0, examples.prompt_ids.shape[1])
    mean, std = examples.mean[pictures, flips], examples.std[pictures, flips]
    return Batch(
        latents=mean + std * jax.random.normal(keys[3], mean.shape),
        masks=examples.masks[pictures, flips],
        sizes=examples.sizes[pictures],
        ids=examples.prompt_ids[pictures, prompts],
        noise=jax.random.normal(keys[4], mean.shape),
        timesteps=jax.random.randint(keys[5], (size,), 0, model.schedule.num_train_timesteps),
    )


def _weights_and_context(
    model: Architecture,
    params: dict[str, Params],
    encoding: Encoding,
    sizes: Float32[Array, "batch sizes"],
    concept: Learnt,
    settings: Settings,
) -> tuple[Params, Context]:
    """The weights that denoise, and what they read of prompts, under all that is learnt."""
    frozen = params["unet"]
    if isinstance(concept, Concept):
        edited = insert(frozen, concept, Gate(settings.bias, settings.temperature))
        return frozen, model.read(edited, encoding, sizes)
    changed = add(frozen, concept)
    context = model.read(changed, encoding, sizes)
    if settings.method == "custom_diffusion":
        # As its authors have it, no gradient comes by way of the start token, at which every word looks.
        fixed = jax.lax.stop_gradient(context.layers)
        layers = jax.tree.map(lambda moving, still: moving.at[:, :1].set(still[:, :1]), context.layers, fixed)
        context = context._replace(layers=layers)
    return changed, context


def loss(
    model: Architecture,
    params: dict[str, Params],
    whitening: Float32[Array, "context context"] | None,
    concept: Learnt,
    batch: Batch,
    settings: Settings,
) -> tuple[Float32[Array, ""], Float32[Array, " context"]]:
    """The denoising loss of a batch under what is learnt; arguments as for `train_step`.

    The squared error of each pixel is weighted by the mask, and the weighted sum divided by the sum of the weights;
    then the mean over the samples, with min-SNR weights if those are asked for. With prior preservation the second half
    of the batch is of the prior, whose mean counts `settings.prior_weight` times beside the first half's.

    Returns:
        (loss, mean encoding at the concept's token over the batch, [context_width]), float32.
    """
    encoding = model.encode(params, batch.ids, concept.embedding[None])
    concept_encoding = mean_at(encoding.tokens, batch.ids == model.tokenizer.vocabulary_size)
    if settings.straight_through and isinstance(concept, Concept):
        assert whitening is not None
        through = concept_encoding - jax.lax.stop_gradient(concept_encoding)
        concept = concept.with_target_input(concept.target_input + through, whitening)
    unet, context = _weights_and_context(model, params, encoding, batch.sizes, concept, settings)
    noisy = model.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    prediction = model.denoise(unet, noisy.astype(model.unet.dtype), batch.timesteps, context)
    target = model.schedule.target(batch.latents, batch.noise, batch.timesteps)
    error = jnp.mean((prediction.astype(jnp.float32) - target) ** 2, axis=-1)
    per_sample = jnp.sum(batch.masks * error, axis=(1, 2)) / jnp.sum(batch.masks, axis=(1, 2))
    if settings.snr_gamma:
        per_sample *= model.schedule.loss_weights(batch.timesteps, settings.snr_gamma)
    if settings.prior_pictures:
        own, prior = per_sample.reshape(2, -1).mean(axis=1)
        return own + settings.prior_weight * prior, concept_encoding
    return per_sample.mean(), concept_encoding


def loss_and_gradient(
    model: Architecture,
    params: dict[str, Params],
    whitening: Float32[Array, "context context"] | None,
    examples: Examples,
    learning: Learning,
    key: Key[Array, ""],
    settings: Settings,
    place: Callable[[Batch], Batch] = lambda parts: parts,
) -> tuple[tuple[Float32[Array, ""], Float32[Array, " context"]], dict[str, Any]]:
    """Computes the loss and its gradient on the batch of the next step; arguments as for `train_step`.

    Returns:
        ((loss, mean encoding at the concept's token over the batch, [context_width]), gradient by trained field), all
        float32.
    """
    concept = learning.concept
    of_step = jax.random.fold_in(key, learning.step)
    if examples.prior is None:
        batches = [draw_batch(of_step, examples, model, settings)]
    else:
        own, other = jax.random.split(of_step)
        batches = [draw_batch(own, examples, model, settings), draw_batch(other, examples.prior, model, settings)]

    def split(*arrays: Array) -> Array:
        return jnp.concatenate([one.reshape(settings.accumulation, -1, *one.shape[1:]) for one in arrays], axis=1)

    parts = place(jax.tree.map(split, *batches))

    def of_part(part: Batch) -> tuple[tuple[Float32[Array, ""], Float32[Array, " context"]], dict[str, Any]]:
        def loss_of(parameters: dict[str, Any]) -> tuple[Float32[Array, ""], Float32[Array, " context"]]:
            return loss(model, params, whitening, dataclasses.replace(concept, **parameters), part, settings)

        return jax.value_and_grad(loss_of, has_aux=True)(concept.trainable(settings.trained))

    # Parts are of one size, so the mean of their means is the mean over the batch.
    return jax.tree.map(lambda array: array.mean(axis=0), jax.lax.map(of_part, parts))


def train_step(
    model: Architecture,
    params: dict[str, Params],
    whitening: Float32[Array, "context context"] | None,
    examples: Examples,
    learning: Learning,
    key: Key[Array, ""],
    settings: Settings,
    place: Callable[[Batch], Batch] = lambda parts: parts,
) -> tuple[Learning, Float32[Array, ""]]:
    """Takes one optimiser step.

    Args:
        model: the architecture.
        params: its frozen weights, without edits.
        whitening: C^-1/2, float32 [context_width, context_width]; other methods than Perfusion know no C.
        examples: what the concept is learnt from.
        learning: the state before.
        key: the concept's own; the step's is folded from it, so that a step depends on its number alone.
        settings: how to learn.
        place: puts a batch, each field [accumulation, samples, ...], on the devices that compute it; by default it
            stays where it is.

    Returns:
        (the state after, the loss before the step). Where the loss or a gradient is not finite, the state stays what it
        was from then on, and the loss is NaN.
    """
    (value, encoding), gradient = loss_and_gradient(model, params, whitening, examples, learning, key, settings, place)
    parameters = learning.concept.trainable(settings.trained)
    updates, optimizer = make_optimizer(settings).update(gradient, learning.optimizer, parameters)
    moved = dataclasses.replace(learning.concept, **optax.apply_updates(parameters, updates))
    if isinstance(moved, Concept):
        assert whitening is not None
        decay = settings.target_input_decay
        moved = moved.with_target_input(decay * moved.target_input + (1 - decay) * encoding, whitening)
    diverged = learning.diverged | ~jnp.isfinite(value) | ~jnp.isfinite(optax.tree.norm(gradient))
    after = Learning(moved, optimizer, learning.step + 1, diverged)
    kept = jax.tree.map(lambda old, new: jnp.where(diverged, old, new), learning, after)
    return dataclasses.replace(kept, diverged=diverged), jnp.where(diverged, jnp.nan, value)
