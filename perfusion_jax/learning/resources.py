"""What all rounds of a run share: the frozen model over the mesh, the metric, the evaluator and compiled steps."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from perfusion_jax.base_model import BaseModel, load_base_model, network_dtype
from perfusion_jax.config import is_fleet
from perfusion_jax.data.examples import Examples
from perfusion_jax.data.measuring import find_or_measure
from perfusion_jax.formats import covariance_file
from perfusion_jax.learning.fleet_step import make_fleet_step, member_shapes, step_components, step_shapes
from perfusion_jax.learning.judges import load_evaluator
from perfusion_jax.learning.metrics import Evaluator
from perfusion_jax.learning.prior import draw_prior
from perfusion_jax.learning.step import Settings
from perfusion_jax.method.baselines import BASELINES
from perfusion_jax.pod import distributed
from perfusion_jax.pod.mesh import make_mesh, place, submesh_view, whole


def load_base(config: ConfigDict) -> BaseModel:
    """Loads the frozen model that a config names."""
    return load_base_model(
        config.base,
        dtype=network_dtype(config.dtype),
        revision=config.revision or None,
        variant=config.variant or None,
    )


def find_whitening(config: ConfigDict, base: BaseModel) -> jax.Array:
    """C^-1/2 of the base model's text encoders: of the file that the config names, else of the one that came with the
    model, else of the one in the cache folder, measured now if it is not there.

    Raises:
        InputError: the file, or the captions to measure on, cannot be used.
        UnavailableError: storage fails.
    """
    width = base.model.context_width
    given = config.covariance or (base.covariance if not config.captions else None)
    if given:
        return covariance_file.load_whitening(given, width)
    # One process measures: the numbers of another machine may differ in their last digits.
    file = distributed.from_first(lambda: str(find_or_measure(base, config.captions)))
    own = covariance_file.load_whitening(file, width) if distributed.is_first() else jnp.zeros((width, width))
    return distributed.array_of_first(own)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Resources:
    """What all rounds share.

    Attributes:
        config: the run's.
        base: the model, its weights on this process's first device.
        params: those that the step reads, over the mesh.
        whitening: C^-1/2 on the first device; None for methods that know no C.
        mesh_whitening: the same over the mesh.
        evaluator: what concepts are scored by, or None.
        drawing_base, drawing_mesh: the model that draws, and what devices of this process share that; None for one.
        mesh: of all devices.
        compiled: the compiled step by (settings, slots, pictures, prompts, side).
        prior: pictures of a kind, by the arguments of `prior.draw_prior` but the model; those of a kind are drawn once.
    """

    config: ConfigDict
    base: BaseModel
    params: Any
    whitening: jax.Array | None
    mesh_whitening: jax.Array | None
    evaluator: Evaluator | None
    drawing_base: BaseModel
    drawing_mesh: Mesh | None
    mesh: Mesh
    compiled: Callable[..., jax.stages.Compiled]
    prior: Callable[..., Examples]

    def side_of(self, config: ConfigDict) -> int:
        """Side of a concept's pictures in pixels."""
        return config.size or self.base.model.picture_side

    @property
    def keeps_best(self) -> bool:
        """Whether scores choose the step that is kept."""
        return bool(self.config.validate_every and self.config.validation_prompts and self.evaluator)


def mesh_of(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a config asks for (see `config.mesh`).

    Args:
        config: the run's.
        devices: others than the job's, to compile for.

    Raises:
        InputError: the devices cannot be arranged so.
    """
    devices = devices or jax.devices()
    if config.mesh:
        return make_mesh(config.mesh, devices)
    if is_fleet(config):
        return make_mesh((-1, 1), devices)
    part = config.batch_size // config.accumulation
    count = max(number for number in range(1, len(devices) + 1) if part % number == 0)
    return make_mesh((1, count), devices[:count])


def load_resources(config: ConfigDict) -> Resources:
    """Loads the model and lays its weights over the mesh.

    Raises:
        InputError: something that the config names cannot be used.
        UnavailableError: it cannot be read for now.
    """
    mesh = mesh_of(config)
    base = load_base(config)
    params = place({name: base.params[name] for name in step_components(base.model)}, mesh)
    # One copy on the first device is enough.
    base = dataclasses.replace(
        base, params={**base.params, **submesh_view(params, Mesh(jax.local_devices()[:1], ("data",)))}
    )
    whitening = None if config.method in BASELINES else find_whitening(config, base)
    drawing_base, drawing_mesh = base, None
    here = mesh.local_devices
    if config.validation_prompts and len(here) > 1:
        drawing_mesh = Mesh(np.array(here), ("data",), axis_types=(AxisType.Auto,))
        vae = jax.device_put(base.params["vae"], whole(drawing_mesh))
        drawing_base = dataclasses.replace(base, params={**submesh_view(params, drawing_mesh), "vae": vae})

    @functools.cache
    def compiled(settings: Settings, slots: int, pictures: int, prompts: int, side: int) -> jax.stages.Compiled:
        shapes = member_shapes(base.model, settings, pictures, prompts, side)
        step: Any = make_fleet_step(base.model, settings, mesh)
        return step.lower(*step_shapes(base.model, shapes, slots)).compile()

    @functools.cache
    def prior(*arguments: Any) -> Examples:
        return draw_prior(base, *arguments)

    mesh_whitening = place(whitening, mesh)
    # A single concept that is never looked at needs none, which may be a download.
    looks = config.validation_prompts and (config.validate_every or is_fleet(config))
    evaluator = load_evaluator(config) if looks else None
    return Resources(
        config=config,
        base=base,
        params=params,
        whitening=whitening,
        mesh_whitening=mesh_whitening,
        evaluator=evaluator,
        drawing_base=drawing_base,
        drawing_mesh=drawing_mesh,
        mesh=mesh,
        compiled=compiled,
        prior=prior,
    )
