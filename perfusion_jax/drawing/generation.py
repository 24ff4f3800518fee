"""`generate`: prompts, seeds and concepts to pictures, in batches of one size so that nothing compiles twice."""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from math import isfinite
from operator import index
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from perfusion_jax.base_model import Architecture, BaseModel, whole_sizes
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
    to_pixels,
)
from perfusion_jax.drawing.samplers import Plan, make_plan, settle, spaced
from perfusion_jax.formats.concept_file import PERFUSION, ConceptCard, TrainedConcept
from perfusion_jax.method import concept as concept_lib
from perfusion_jax.method.baselines import Word, add
from perfusion_jax.method.edit import Gate
from perfusion_jax.method.surgery import Params
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.names import PLACEHOLDER

# Concepts are padded to this many, so that up to this many can come and go without compiling anew.
SLOTS = 4
# Without a concept that says otherwise (the public implementations).
GUIDANCE = 6.0

Control = float | Sequence[float] | np.ndarray | jax.Array | None
Number = TypeVar("Number", int, float)


class Drawn(NamedTuple):
    """Some of the pictures asked for.

    Attributes:
        pixels: uint8 [count, height, width, 3].
        attention: how much each latent looked at each token of its prompt, the mean over heads, layers and steps:
            float32 [count, height / f, width / f, tokens]; None if it was not asked for.
    """

    pixels: np.ndarray
    attention: np.ndarray | None


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
_compiled_begin = jax.jit(begin, static_argnames="tokens")
_compiled_fresh = jax.jit(fresh_noise)


def draw_batch(
    mesh: Mesh | None,
    model: Architecture,
    params: dict[str, Params],
    ids: np.ndarray,
    unprompted: Unprompted | None,
    seeds: np.ndarray,
    size: tuple[int, int],
    plan: Plan,
    phase_of_step: np.ndarray,
    guidance: Guidance,
    concepts: Concepts | None,
    init_latents: jax.Array | None,
    attention: bool,
    on_step: Callable[[], None] | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Draws one batch.

    Args:
        mesh: devices that share it, or None.
        model: the architecture.
        params: its weights, without edits.
        ids: int32 [batch, tokens].
        unprompted: what guidance leads away from; None without guidance.
        seeds: one per picture, uint32 [batch].
        size: height and width in pixels.
        plan: of the sampler; with `init_latents`, of the steps that are left.
        phase_of_step: which of the concepts' phases each step reads, int32 [steps].
        guidance: see `denoising.Guidance`.
        concepts: what the prompts may name.
        init_latents: of a picture to start from, the shape of the noise.
        attention: whether to tell where the UNet looked.
        on_step: called after every step.

    Returns:
        (pictures in about [-1, 1], float32 [batch, height, width, 3]; the attention that each latent paid to each token
        of its prompt, the mean over heads, layers and steps, float32 [batch, height / f, width / f, tokens], or None).
    """
    prompts = _compiled_read(mesh, model, params, ids, whole_sizes(*size), unprompted, concepts)
    noise = _compiled_noise(model, seeds, *size)
    walk = _compiled_begin(noise, plan, ids.shape[1] if attention else None, init_latents)
    columns = [np.broadcast_to(np.asarray(column), len(phase_of_step)) for column in plan]
    puts_back = np.any(plan.fresh)
    for number, phase in enumerate(phase_of_step):
        before, at = walk, Plan(*(column[number] for column in columns))
        fresh = _compiled_fresh(seeds, number, before.latents) if puts_back else None
        walk = compiled_step(mesh, model, params["unet"], prompts, before, at, phase, guidance, fresh)
        before.latents.block_until_ready()  # so that what is told of the progress is one step ahead at most
        if on_step is not None:
            on_step()
    images = _compiled_show(mesh, model, params["vae"], walk.latents)
    return images, None if walk.attention is None else walk.attention / len(phase_of_step)


def generate(
    base: BaseModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    concepts: Sequence[TrainedConcept] = (),
    **options: Any,
) -> np.ndarray:
    """Draws prompts.

    Args:
        base: the model.
        prompts: one per picture; they may name concepts by `<name>`.
        seeds: one per picture, whole numbers from 0 to 2**32 - 1. A picture depends on its own prompt, its seed and the
            options alone.
        concepts: what the prompts may name. A concept acts only on prompts that name it; but what other methods than
            Perfusion have added to the UNet acts on all of them, and on what guidance leads away from.
        options: those of `drawing`, all by name. Numbers may be of Python, NumPy or JAX.

    Returns:
        uint8 [len(prompts), height, width, 3].

    Raises:
        InputError: as `drawing`.
    """
    return np.concatenate([some.pixels for some in drawing(base, prompts, seeds, concepts, **options)])


def drawing(
    base: BaseModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    concepts: Sequence[TrainedConcept] = (),
    *,
    sampler: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    guidance: float | None = None,
    guidance_rescale: float = 0.0,
    negative_prompt: str | None = None,
    bias: Control = None,
    temperature: Control = None,
    strength: Control = None,
    start: Control = None,
    end: Control = None,
    lock: str = "local",
    height: int | None = None,
    width: int | None = None,
    init_image: np.ndarray | None = None,
    init_strength: float = 0.8,
    batch_size: int = 8,
    attention: bool = False,
    on_step: Callable[[], None] | None = None,
    mesh: Mesh | None = None,
) -> Iterator[Drawn]:
    """Draws prompts batch by batch.

    What cannot be drawn is refused by the call itself, before the first batch is asked for.

    Args:
        base, prompts, seeds, concepts: as for `generate`.
        sampler: `ddim`, `dpm++`, `euler` or `euler_a`; that of the base model's scheduler config if left out.
        steps: sampling steps; 50, 20, 30 or 30 of these if left out.
        spacing: `leading`, `trailing` or `linspace`: which timesteps they are (diffusers' `timestep_spacing`); the
            model's own if left out. Models of few steps are drawn by `trailing`, also where their config forgot it.
        guidance: guidance scale, 1 or less for none; that of the first concept if left out, 6 without concepts.
        guidance_rescale: how much of the contrast that guidance adds is taken back, 0 to 1.
        negative_prompt: what guidance leads away from. It goes through no edit and names no concept. Left out, it is
            the empty prompt, or zeros where the model says so (`force_zeros_for_empty_prompt`).
        bias, temperature: of the gates, one for all concepts or one for each; the concepts' own if left out.
        strength: of the concepts, likewise; 1, the paper's edit, if left out. 0 leaves the model alone, but for the
            words of concepts that another method has learnt.
        start, end: between which fractions of the steps a concept acts, likewise; all of them if left out. These two,
            `bias` and `temperature` are of Perfusion's edit, and refused where all concepts are of other methods.
        lock: `local`, or `global`: all keys come from the prompt with the super-categories in place of the concepts.
        height, width: in pixels; the model's own, or those of `init_image`, if left out.
        init_image: a picture to start from instead of noise, uint8 [height, width, 3].
        init_strength: how much of it is drawn anew, above 0, at most 1.
        batch_size: pictures drawn at once; the last batch is padded.
        attention: also tell where the UNet looked.
        on_step: called after every step of every batch.
        mesh: devices that share each batch, whose size they divide; the weights of `base` lie whole on all of them.

    Returns:
        An iterator that draws as it goes: the next `batch_size` pictures; the last time, those that are left.

    Raises:
        InputError: a prompt names a concept that is not given, or an option is impossible; before anything is drawn.
    """
    if len(prompts) != len(seeds):
        raise InputError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each picture")
    height, width = _size(base, height, width, init_image)
    steps = None if steps is None else _number("steps", steps, index)
    schedule = spaced(base.model.schedule, spacing)
    sampler, steps = settle(schedule, sampler, steps)
    batch_size = _number("batch_size", batch_size, index)
    init_strength = _number("init_strength", init_strength, float)
    skipped = 0 if init_image is None else skipped_steps(steps, init_strength)
    plan = make_plan(schedule, sampler, steps, skipped)
    if guidance is None:
        guidance = concepts[0].card.guidance_scale if concepts else GUIDANCE
    guidance = _number("guidance", guidance, float)
    guidance_rescale = _number("guidance_rescale", guidance_rescale, float)
    _check_range("guidance", guidance, 0)
    _check_range("guidance_rescale", guidance_rescale, 0, 1)
    _check_range("batch_size", batch_size, 1)
    ids = base.model.tokenizer(prompts, [card.placeholder for _, card in concepts])
    unprompted = _unprompted(base.model, negative_prompt, batch_size) if guidance > 1 else None
    in_slots, phase_of_step = None, np.zeros(steps - skipped, np.int32)
    of_edit = {"bias": bias, "temperature": temperature, "start": start, "end": end}
    if not any(card.method == PERFUSION for _, card in concepts):
        for _, card in concepts:
            check_controls(card, [name for name, given in of_edit.items() if given is not None])
    trained = next((card for _, card in concepts if not card.lock_keys), None)
    if trained and lock == "global":
        raise InputError(
            f"{trained.name}: its keys were trained (config.lock_keys=False), and the global lock would pass them "
            "over: draw it with the local one"
        )
    strengths = per_concept("strength", strength, [1.0] * len(concepts)) if concepts else []
    words = _words(base.model, concepts)
    if concepts:
        gates = _gates(words, bias, temperature, strength)
        windows = per_concept("start", start, [0.0] * len(concepts)), per_concept("end", end, [1.0] * len(concepts))
        in_slots, phase_of_step = _in_slots(base, words, gates, np.arange(skipped, steps) / steps, windows, ids, lock)
    init_latents = None if init_image is None else _latents_of(base, init_image)
    scales = Guidance(jnp.float32(guidance), jnp.float32(guidance_rescale))

    def batches() -> Iterator[Drawn]:
        # Here, so that of a sweep's drawings each has its own only while it is drawn.
        params = {**base.params, "unet": _changed(base.params["unet"], concepts, strengths)}
        for first in range(0, len(ids), batch_size):
            count = len(ids[first : first + batch_size])
            rows = np.minimum(np.arange(first, first + batch_size), first + count - 1)  # one batch size is compiled
            images, seen = draw_batch(
                mesh,
                base.model,
                params,
                ids[rows],
                unprompted,
                np.asarray(seeds, np.uint32)[rows],
                (height, width),
                plan,
                phase_of_step,
                scales,
                None if in_slots is None else in_slots._replace(present=in_slots.present[rows]),
                init_latents,
                attention,
                on_step,
            )
            yield Drawn(to_pixels(images)[:count], None if seen is None else np.asarray(seen)[:count])

    return batches()


_added = jax.jit(add)


def check_controls(card: ConceptCard, controls: Collection[str]) -> None:
    """Sees that what is given acts on a concept.

    Raises:
        InputError: it was learnt by a method that has no such control.
    """
    if card.method == PERFUSION:
        return
    for name in ("bias", "temperature", "start", "end"):
        if name in controls:
            raise InputError(f"{name} is of Perfusion's edit: {card.name} was learnt by {card.method}, which has none")


def _words(model: Architecture, concepts: Sequence[TrainedConcept]) -> list[TrainedConcept]:
    """The concepts, those of other methods than Perfusion as words alone."""
    return [
        trained._replace(concept=model.word_alone(trained.concept.embedding))
        if isinstance(trained.concept, Word)
        else trained
        for trained in concepts
    ]


def _changed(unet_params: Params, concepts: Sequence[TrainedConcept], strengths: Sequence[float]) -> Params:
    """The UNet with what other methods than Perfusion have learnt added to it."""
    for (concept, _), strength in zip(concepts, strengths, strict=True):
        if isinstance(concept, Word) and concept.changes:
            unet_params = _added(unet_params, concept, strength)
    return unet_params


def _unprompted(model: Architecture, negative_prompt: str | None, batch_size: int) -> Unprompted:
    weight = float(negative_prompt is not None or not model.empty_prompt_is_zero)
    try:
        ids = model.tokenizer([negative_prompt or ""])
    except InputError as error:
        if PLACEHOLDER.search(negative_prompt or ""):
            raise InputError(
                f"negative_prompt is {negative_prompt!r}: it can name no concept: leave that out"
            ) from error
        raise
    ids = np.repeat(ids, batch_size, axis=0)
    return Unprompted(ids, np.full(batch_size, weight, np.float32))


def _number(name: str, given: Any, kind: Callable[[Any], Number]) -> Number:
    """A number of Python's, of whatever library the given one is; `kind` is `index` for whole ones, or `float`.

    Raises:
        InputError: it is none.
    """
    try:
        return kind(given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {given!r}; it must be a {'whole ' * (kind is index)}number") from error


def _check_range(name: str, value: float, least: float, most: float | None = None) -> None:
    if not (least <= value <= (most or float("inf")) and isfinite(value)):
        raise InputError(f"{name} is {value}; it must be at least {least}" + (f" and at most {most}" if most else ""))


def _gates(concepts: Sequence[TrainedConcept], bias: Control, temperature: Control, strength: Control) -> Gate:
    """The gates of concepts, float32 [concepts] each: their own where a control is left out."""
    return Gate(
        jnp.asarray(per_concept("bias", bias, [card.bias for _, card in concepts])),
        jnp.asarray(per_concept("temperature", temperature, [card.temperature for _, card in concepts])),
        jnp.asarray(per_concept("strength", strength, [1.0] * len(concepts))),
    )


def _latents_of(base: BaseModel, image: np.ndarray) -> jax.Array:
    """Latents of a picture, uint8 [height, width, 3]: float32 [1, height / f, width / f, channels]."""
    pixels = jnp.asarray(image[None].astype(np.float32) / 127.5 - 1, base.model.vae.dtype)
    return base.model.encode_image(base.params["vae"], pixels).mean


def per_concept(name: str, given: Control, defaults: Sequence[float]) -> list[float]:
    """Values of one control of all concepts: those given, one for all or one for each, or else the defaults.

    Raises:
        InputError: another number of values, or an impossible one.
    """
    try:
        array = np.asarray(defaults if given is None else given, np.float64)  # numbers of any library, and arrays
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {given!r}; it must be a number, or one for each concept") from error
    if array.ndim > 1:
        raise InputError(f"{name} has the shape {array.shape}: give one number, or one for each concept")
    values = array.reshape(-1).tolist()
    if len(values) not in (1, len(defaults)):
        raise InputError(f"{name} has {len(values)} values: give one, or one for each of the {len(defaults)} concepts")
    for value in values:
        if not isfinite(value) or (name == "temperature" and value <= 0):
            raise InputError(f"{name} is {value}; it must be finite" + ", and above 0" * (name == "temperature"))
        if name in ("start", "end") and not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; it is a fraction of the steps, from 0 to 1")
    return values * len(defaults) if len(values) == 1 else values


def _size(base: BaseModel, height: int | None, width: int | None, init_image: np.ndarray | None) -> tuple[int, int]:
    """Height and width of the pictures in pixels."""
    if init_image is not None and (init_image.ndim != 3 or init_image.shape[2] != 3 or init_image.dtype != np.uint8):
        raise InputError(f"init_image is {init_image.dtype} {init_image.shape}; it must be uint8 [height, width, 3]")
    native = base.model.picture_side
    own = (native, native) if init_image is None else init_image.shape[:2]
    size = (_number("height", height or own[0], index), _number("width", width or own[1], index))
    if init_image is not None and size != own:
        raise InputError(f"init_image has {own[1]} x {own[0]} pixels; the picture asked for has {size[1]} x {size[0]}")
    if any(side % base.model.vae_factor or side <= 0 for side in size):
        raise InputError(
            f"pictures of {size[1]} x {size[0]} pixels: width and height must be multiples of {base.model.vae_factor}"
        )
    return size


def skipped_steps(steps: int, init_strength: float) -> int:
    """How many steps, from the noisy end, a picture to start from makes unnecessary (diffusers' rule; one is left).

    Raises:
        InputError: an impossible strength.
    """
    if not 0 < init_strength <= 1:
        raise InputError(f"init_strength is {init_strength}; it must be above 0 and at most 1")
    return min(steps - int(steps * init_strength), steps - 1)


def _in_slots(
    base: BaseModel,
    concepts: Sequence[TrainedConcept],
    gates: Gate,
    fractions: np.ndarray,
    windows: tuple[Sequence[float], Sequence[float]],
    ids: np.ndarray,
    lock: str,
) -> tuple[Concepts, np.ndarray]:
    """Puts concepts into slots; returns them, and which of their phases each step reads, int32 [steps].

    Args:
        base: the model.
        concepts: at least one.
        gates: theirs.
        fractions: how much of the sampling is done before each step, 0 to 1, [steps].
        windows: start and end of when each concept acts, as such fractions.
        ids: of all prompts.
        lock: as for `drawing`.
    """
    if lock not in ("local", "global"):
        raise InputError(f"lock is {lock!r}; it must be 'local' or 'global'")
    count = len(concepts)
    slots = max(SLOTS, count)

    def pad(array: jax.Array, fill: float = 0.0) -> jax.Array:
        empty = jnp.full((slots - count, *array.shape[1:]), fill, jnp.float32)
        return jnp.concatenate([jnp.asarray(array, jnp.float32), empty])

    super_embeddings = None
    if lock == "global":
        super_embeddings = pad(jnp.stack([base.super_category_embedding(card.super_category) for _, card in concepts]))
    start, end = (np.asarray(times) for times in windows)
    active = np.ones((len(fractions), slots), np.float32)
    active[:, :count] = (start <= fractions[:, None]) & (fractions[:, None] < end)
    phases, phase_of_step = np.unique(active, axis=0, return_inverse=True)
    if len(phases) > 1:  # 3, 5, 9, ...: one concept has at most 3, so that other windows of it compile nothing anew
        whole = 2 ** max(1, math.ceil(math.log2(len(phases) - 1))) + 1
        phases = np.pad(phases, ((0, whole - len(phases)), (0, 0)), "edge")
    present = np.any(ids[:, :, None] == base.model.tokenizer.vocabulary_size + np.arange(slots), axis=1)
    in_slots = Concepts(
        stacked=jax.tree.map(pad, concept_lib.stack([concept for concept, _ in concepts])),
        gates=Gate(*(pad(jnp.asarray(field), fill=1.0) for field in gates)),
        present=jnp.asarray(present, jnp.float32),
        phases=jnp.asarray(phases),
        super_embeddings=super_embeddings,
    )
    return in_slots, phase_of_step.reshape(-1).astype(np.int32)
