"""What a fleet's step takes on TPUs that are not there, by their compiler."""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from perfusion_jax.base_model import Architecture, load_architecture, network_dtype
from perfusion_jax.config import MEMORY_ADVICE, check, is_fleet
from perfusion_jax.learning.fleet_step import make_fleet_step, member_shapes, step_shapes
from perfusion_jax.learning.resources import mesh_of
from perfusion_jax.learning.step import Settings
from perfusion_jax.pod import hlo_report
from perfusion_jax.pod.chips import find_chip
from perfusion_jax.pod.hlo_report import ProgramReport
from perfusion_jax.runtime.errors import InputError, out_of_memory

PICTURES = 8  # that each concept's examples are padded to; they take little memory


def topology_devices(name: str) -> list[jax.Device]:
    """Returns the devices of a TPU topology such as `v5e:2x4`; they can be compiled for and nothing else.

    Raises:
        InputError: the compiler is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu, the compiler for TPUs, is not installed: pip install -e '.[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would ask the cloud what machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here holds a TPU
    # A v4 chip is one device to JAX; without this the compiler takes its two cores for two.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--topology={name}: no such topology ({reason}); one is v5e:2x4") from error


def compile_step(
    model: Architecture, settings: Settings, mesh: Mesh, members: int, side: int, prompts: int
) -> ProgramReport:
    """Compiles a fleet's step and reports on it.

    Args:
        model: the architecture.
        settings: how concepts are learnt.
        mesh: of devices that are of one kind.
        members: concepts at once.
        side: of the pictures, in pixels.
        prompts: of each picture.
    """
    shapes = step_shapes(model, member_shapes(model, settings, PICTURES, prompts, side), members)
    step: Any = make_fleet_step(model, settings, mesh)
    compiled = step.lower(*shapes).compile()
    chip = find_chip(mesh.devices.flat[0].device_kind)
    return hlo_report.report(compiled, dict(mesh.shape), chip, loops=settings.accumulation)


def describe(config: ConfigDict, topology: str) -> dict[str, Any]:
    """Compiles the step of a config and returns what there is to tell, as plain values.

    Raises:
        InputError: the config or the topology is impossible, or the step does not fit.
    """
    check(config)
    if not is_fleet(config):
        raise InputError("--config is of one concept: take configs/fleet.py")
    devices = topology_devices(topology)
    mesh = mesh_of(config, devices)
    places = mesh.shape["concept"]
    members = config.members or places
    if members % places:
        raise InputError(f"config.members is {members}; it must be a multiple of {places}, the mesh's axis concept")
    dtype = jnp.dtype(jnp.bfloat16) if config.dtype == "auto" else network_dtype(config.dtype)
    model = load_architecture(config.base, dtype=dtype, revision=config.revision or None)
    settings = Settings.of(config)
    side = config.size or model.picture_side
    try:
        found = compile_step(model, settings, mesh, members, side, len(config.templates))
    except jax.errors.JaxRuntimeError as error:
        reason = out_of_memory(error)
        first_line = str(error).partition("\n")[0]
        problem = f"fit ({reason}): {MEMORY_ADVICE}" if reason else f"compile: {first_line}"
        raise InputError(f"--topology={topology}: the step with concepts={members} does not {problem}") from error
    return {
        "topology": topology,
        "chip": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "members": members,
        "samples_per_device": members * settings.batch_size // len(devices),
        "per_device": dataclasses.asdict(found) | {"fits": found.fits, "bound_seconds": found.bound_seconds},
        "bound_concepts_per_hour": 3600 * members / (config.steps * found.bound_seconds),
    }


def text(step: dict[str, Any]) -> str:
    """What `describe` tells, for people."""
    device = step["per_device"]
    crossing = [
        f"{axes}: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
        for axes, kinds in device["collectives"].items()
    ]
    gigabytes = {
        key: f"{device[key] / 1e9:.2f} GB"
        for key in ("traffic", "accessed", "arguments", "temporaries", "peak", "memory")
    }
    mesh = " x ".join(f"{axis} {size}" for axis, size in step["mesh"].items())
    return "\n".join(
        [
            f"{step['topology']}: {step['devices']} devices {step['chip']}; mesh {mesh}; {step['members']} concepts "
            f"in all, {step['samples_per_device']} samples on each device",
            "per device and step, as the compiler estimates:",
            f"  work         {device['flops'] / 1e12:.4g} TFLOP",
            f"  traffic      {gigabytes['traffic']} of HBM; operations access {gigabytes['accessed']}, "
            "most of it in vector memory",
            f"  arguments    {gigabytes['arguments']}",
            f"  temporaries  {gigabytes['temporaries']}",
            f"  peak         {gigabytes['peak']} of {gigabytes['memory']}: "
            + ("fits" if device["fits"] else "DOES NOT FIT"),
            f"  collectives  {'; '.join(crossing) or 'none'}",
            "bound by the chip's published peaks (not a measurement; no run is faster):",
            f"  step         {device['bound_seconds'] * 1e3:.4g} ms (computing {device['compute_seconds'] * 1e3:.4g}, "
            f"memory {device['memory_seconds'] * 1e3:.4g})",
            f"  concepts     {step['bound_concepts_per_hour']:.0f} per hour",
        ]
    )
