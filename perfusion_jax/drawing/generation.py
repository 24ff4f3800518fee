"""`generate`: prompts, seeds and concepts to pictures, in batches of one size so that nothing compiles twice."""

from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from operator import index
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from perfusion_jax.base_model import Architecture, BaseModel
from perfusion_jax.drawing.controls import Control, Controls, changed, check, in_slots
from perfusion_jax.drawing.denoising import Guidance, Unprompted, to_pixels
from perfusion_jax.drawing.programs import Program
from perfusion_jax.drawing.samplers import make_plan, sampler_and_steps, spaced
from perfusion_jax.formats.concept_file import TrainedConcept
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.names import PLACEHOLDER

# Without a concept that says otherwise (the public implementations).
GUIDANCE = 6.0

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
    sampler, steps = sampler_and_steps(schedule, sampler, steps)
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
    controls = Controls(bias, temperature, strength, start, end, lock)
    check(concepts, controls)
    acting, phase_of_step = in_slots(base, concepts, controls, np.arange(skipped, steps) / steps, ids)
    scales = Guidance(jnp.float32(guidance), jnp.float32(guidance_rescale))
    init_latents = None if init_image is None else _latents_of(base, init_image)

    def batches() -> Iterator[Drawn]:
        # Here, so that of a sweep's drawings each has its own only while it is drawn.
        params = {**base.params, "unet": changed(base.params["unet"], concepts, strength)}
        program = Program(
            mesh=mesh,
            model=base.model,
            params=params,
            size=(height, width),
            plan=plan,
            phase_of_step=phase_of_step,
            guidance=scales,
            init_latents=init_latents,
            attention=attention,
            on_step=on_step,
        )
        for first in range(0, len(ids), batch_size):
            count = len(ids[first : first + batch_size])
            rows = np.minimum(np.arange(first, first + batch_size), first + count - 1)  # one batch size is compiled
            of_batch = None if acting is None else acting._replace(present=acting.present[rows])
            images, seen = program.draw(ids[rows], np.asarray(seeds, np.uint32)[rows], unprompted, of_batch)
            yield Drawn(to_pixels(images)[:count], None if seen is None else np.asarray(seen)[:count])

    return batches()


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


def _latents_of(base: BaseModel, image: np.ndarray) -> jax.Array:
    """Latents of a picture, uint8 [height, width, 3]: float32 [1, height / f, width / f, channels]."""
    pixels = jnp.asarray(image[None].astype(np.float32) / 127.5 - 1, base.model.vae.dtype)
    return base.model.encode_image(base.params["vae"], pixels).mean


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
