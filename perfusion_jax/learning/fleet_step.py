"""The fleet's step: one optimiser step of many concepts at once, sharded over a mesh (`pod.mesh`).

A round of a fleet is the state of its members stacked along a leading axis (`pod.slots`). A slot without a member takes
no step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from perfusion_jax.base_model import SIZES, Architecture
from perfusion_jax.data.examples import Examples
from perfusion_jax.learning import step as training
from perfusion_jax.learning.step import Batch, Learning, Settings
from perfusion_jax.method.baselines import BASELINES
from perfusion_jax.method.concept import Concept
from perfusion_jax.pod.mesh import whole
from perfusion_jax.pod.slots import slot_sharding
from perfusion_jax.runtime.errors import InputError


def step_components(model: Architecture) -> tuple[str, ...]:
    """What the weights are called that the step reads."""
    return (*model.text_components, "unet")


class Members(NamedTuple):
    """What the fleet's step reads of its members, each array with the slots as leading axis.

    Attributes:
        examples: what each learns from, padded to one number of pictures.
        keys: each one's own random key, as `jax.random.key_data` gives it: uint32 [slots, ...].
        limits: steps that each is to take, int32 [slots]; 0 for a slot without a member.
    """

    examples: Examples
    keys: jax.Array
    limits: jax.Array


def check_split(settings: Settings, mesh: Mesh) -> None:
    """Checks that the mesh can split a batch.

    Raises:
        InputError: it cannot, evenly.
    """
    ways = mesh.shape["data"]
    if settings.batch_size // settings.accumulation % ways:
        raise InputError(
            f"config.batch_size is {settings.batch_size}, in {settings.accumulation} parts; the axis data of "
            f"config.mesh splits each part in {ways}, which must divide it"
        )


def make_fleet_step(model: Architecture, settings: Settings, mesh: Mesh) -> Callable[..., tuple[Learning, jax.Array]]:
    """Compiles, when called or lowered, one optimiser step of every member: `jax.vmap` of `step.train_step`.

    Args:
        model: the architecture.
        settings: how all of them learn.
        mesh: from `make_mesh`.

    Returns:
        A jitted function of (params, whitening, members, learning): the frozen weights (of `step_components`), C^-1/2
        (None for methods that know no C), `Members`, and the stacked `Learning`, whose buffers it takes. It returns
        (the state after, losses before the step, float32 [slots]). A member that has taken its steps, or whose loss is
        not finite, stays what it was, and its loss is NaN.

    Raises:
        InputError: a batch cannot be split evenly.
    """
    check_split(settings, mesh)
    samples = NamedSharding(mesh, P(None, "data"))

    def split(parts: Batch) -> Batch:
        return jax.lax.with_sharding_constraint(parts, samples)

    def member_step(
        params: Any, whitening: jax.Array, member: Members, learning: Learning
    ) -> tuple[Learning, jax.Array]:
        key = jax.random.wrap_key_data(member.keys)
        after, loss = training.train_step(model, params, whitening, member.examples, learning, key, settings, split)
        done = learning.step >= member.limits
        kept = jax.tree.map(lambda old, new: jnp.where(done, old, new), learning, after)
        return kept, jnp.where(done, jnp.nan, loss)

    by_member = slot_sharding(mesh)
    fleet_step = jax.vmap(member_step, in_axes=(None, None, 0, 0), spmd_axis_name="concept")

    def under_mesh(
        params: Any, whitening: jax.Array, members: Members, learning: Learning
    ) -> tuple[Learning, jax.Array]:
        # Attention's kernel on TPUs asks for the mesh: XLA cannot split it by itself.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fleet_step(params, whitening, members, learning)

    return jax.jit(
        under_mesh,
        in_shardings=(whole(mesh), whole(mesh), by_member, by_member),
        out_shardings=(by_member, by_member),
        donate_argnums=3,
    )


def member_shapes(
    model: Architecture, settings: Settings, pictures: int, prompts: int, side: int
) -> tuple[Members, Learning]:
    """Shapes and dtypes of one member, without the axis of slots, as `jax.ShapeDtypeStruct`.

    Args:
        model: the architecture.
        settings: how it learns.
        pictures: that the examples are padded to.
        prompts: of each picture.
        side: of the pictures, in pixels.
    """

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    latents = side // model.vae_factor
    one = array(dtype=jnp.int32)

    def examples_of(count: int) -> Examples:
        return Examples(
            mean=array(count, 2, latents, latents, model.latent_channels),
            std=array(count, 2, latents, latents, model.latent_channels),
            masks=array(count, 2, latents, latents),
            sizes=array(count, SIZES),
            prompt_ids=array(count, prompts, model.tokenizer.length, dtype=jnp.int32),
            num_pictures=one,
        )

    examples = examples_of(pictures)
    if settings.prior_pictures:
        examples = examples._replace(prior=examples_of(settings.prior_pictures))
    keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    is_baseline = settings.method in BASELINES
    concept = model.baseline_shapes(settings.method, settings.rank) if is_baseline else model.new_concept_shapes()
    learning = jax.eval_shape(lambda learnt: training.start(learnt, settings), concept)
    return Members(examples, keys, one), learning


def step_shapes(model: Architecture, shapes: tuple[Members, Learning], slots: int) -> tuple[Any, ...]:
    """Shapes of all arguments of the fleet's step, to lower it with.

    Args:
        model: the architecture.
        shapes: of one member, from `member_shapes`.
        slots: members at once.
    """
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((slots, *leaf.shape), leaf.dtype), shapes)
    params = jax.eval_shape(lambda tree: tree, {name: model.shapes[name] for name in step_components(model)})
    width = model.context_width
    knows_c = isinstance(shapes[1].concept, Concept)
    return params, jax.ShapeDtypeStruct((width, width), jnp.float32) if knows_c else None, *stacked


def pad_pictures(examples: Examples, pictures: int) -> Examples:
    """Adds pictures of zeros, which are never drawn, up to a number of them; on the host."""

    def pad(array: Any) -> np.ndarray:
        host = np.asarray(array)
        return np.pad(host, [(0, pictures - len(host)), *[(0, 0)] * (host.ndim - 1)])

    padded = {name: pad(field) for name, field in examples._asdict().items() if name not in ("num_pictures", "prior")}
    return examples._replace(**padded)  # type: ignore[arg-type]
