"""Compiled programs that draw a batch: prompts, steps and decoding, on one device or split over a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from perfusion_jax.base_model import Architecture, whole_sizes
from perfusion_jax.drawing.denoising import (
    Concepts,
    Guidance,
    Prompts,
    Unprompted,
    Walk,
    begin,
    fresh_noise,
    noise_for,
    read_prompts,
    take_step,
)
from perfusion_jax.drawing.samplers import Plan
from perfusion_jax.method.surgery import Params


def _on(mesh: Mesh | None, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """On a mesh, has each device compute its own part of the batch; it sends nothing to the others."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# On a mesh, of how prompts, latents and attention lie: the batch comes after the phases, or first.
def _specs(mesh: Mesh | None, guided: bool = True) -> tuple[P, P, Prompts]:
    batch = P() if mesh is None else P(mesh.axis_names)
    return P(), batch, Prompts(P(None, *batch), batch if guided else None)  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("mesh", "model"))
def _compiled_read(
    mesh: Mesh | None,
    model: Architecture,
    params: dict[str, Params],
    ids: jax.Array,
    sizes: jax.Array,
    unprompted: Unprompted | None,
    concepts: Concepts | None,
) -> Prompts:
    whole, batch, prompts = _specs(mesh, unprompted is not None)
    of_concepts = None if concepts is None else jax.tree.map(lambda _: whole, concepts)._replace(present=batch)
    of_unprompted = None if unprompted is None else batch
    specs = (whole, batch, whole, of_unprompted, of_concepts)
    read = _on(mesh, functools.partial(read_prompts, model), specs, prompts)
    return read(params, ids, sizes, unprompted, concepts)


# One program for all steps of all samplers: what may change without compiling anew is an array.
@functools.partial(jax.jit, static_argnames=("mesh", "model"))
def compiled_step(
    mesh: Mesh | None,
    model: Architecture,
    unet_params: Params,
    prompts: Prompts,
    walk: Walk,
    at: Plan,
    phase: jax.Array,
    guidance: Guidance,
    fresh: jax.Array | None,
) -> Walk:
    """`denoising.take_step`, its batch split over a mesh."""
    whole, batch, of_prompts = _specs(mesh, prompts.unprompted is not None)
    of_fresh = None if fresh is None else batch
    specs = (whole, of_prompts, batch, whole, whole, whole, of_fresh)
    return _on(mesh, functools.partial(take_step, model), specs, batch)(
        unet_params, prompts, walk, at, phase, guidance, fresh
    )


@functools.partial(jax.jit, static_argnames=("mesh", "model"))
def _compiled_show(mesh: Mesh | None, model: Architecture, vae_params: Params, latents: jax.Array) -> jax.Array:
    whole, batch, _ = _specs(mesh)
    show = _on(mesh, model.decode_latent, (whole, batch), batch)
    return show(vae_params, latents.astype(model.vae.dtype))


_compiled_noise = jax.jit(noise_for, static_argnames=("model", "height", "width"))
compiled_begin = jax.jit(begin, static_argnames="tokens")
_compiled_fresh = jax.jit(fresh_noise)


class Program(NamedTuple):
    """How batches of pictures of one size are drawn.

    Attributes:
        mesh: devices that share a batch, or None.
        model: the architecture.
        params: its weights, without edits.
        size: height and width in pixels.
        plan: of the sampler; with `init_latents`, of the steps that are left.
        phase_of_step: which of the concepts' phases each step reads, int32 [steps].
        guidance: see `denoising.Guidance`.
        init_latents: of a picture to start from, the shape of the noise; None to start from noise alone.
        attention: whether to tell where the UNet looked.
        on_step: called after every step.
    """

    mesh: Mesh | None
    model: Architecture
    params: dict[str, Params]
    size: tuple[int, int]
    plan: Plan
    phase_of_step: np.ndarray
    guidance: Guidance
    init_latents: jax.Array | None
    attention: bool
    on_step: Callable[[], None] | None

    def draw(
        self, ids: np.ndarray, seeds: np.ndarray, unprompted: Unprompted | None, concepts: Concepts | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Draws one batch.

        Args:
            ids: int32 [batch, tokens].
            seeds: one per picture, uint32 [batch].
            unprompted: what guidance leads away from; None without guidance.
            concepts: what the prompts may name.

        Returns:
            (pictures in about [-1, 1], float32 [batch, height, width, 3]; the attention that each latent paid to each
            token of its prompt, the mean over heads, layers and steps, float32 [batch, height / f, width / f, tokens],
            or None).
        """
        mesh, model, steps = self.mesh, self.model, len(self.phase_of_step)
        prompts = _compiled_read(mesh, model, self.params, ids, whole_sizes(*self.size), unprompted, concepts)
        noise = _compiled_noise(model, seeds, *self.size)
        plan = jax.device_get(self.plan)  # rows of it are taken on the host
        walk = compiled_begin(noise, plan.at(0), ids.shape[1] if self.attention else None, self.init_latents)
        puts_back = np.any(plan.fresh)
        for number, phase in enumerate(self.phase_of_step):
            before = walk
            fresh = _compiled_fresh(seeds, number, before.latents) if puts_back else None
            at = plan.at(number)
            walk = compiled_step(mesh, model, self.params["unet"], prompts, before, at, phase, self.guidance, fresh)
            before.latents.block_until_ready()  # so that what is told of the progress is one step ahead at most
            if self.on_step is not None:
                self.on_step()
        images = _compiled_show(mesh, model, self.params["vae"], walk.latents)
        return images, None if walk.attention is None else walk.attention / steps
