"""Published peaks of accelerators, by JAX's `device_kind`."""

from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from perfusion_jax.runtime.errors import InputError


class Chip(NamedTuple):
    """Published peaks of a chip.

    Attributes:
        flops: per second, bfloat16.
        memory: of the HBM, in bytes.
        bandwidth: of the HBM, in bytes per second.
        devices: that JAX sees on a chip; they share its peaks evenly.
    """

    flops: float
    memory: float
    bandwidth: float
    devices: int = 1


# Sources: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. The page of tpu7x gives capacities in
# GiB; the older ones write the same numbers with GB. NVIDIA's data sheets of the H100 and H200 (SXM, dense bfloat16).
CHIPS: Mapping[str, Chip] = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1638e9),
    "TPU7x": Chip(2307e12, 192 * 2**30, 7380e9, devices=2),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3.35e12),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2.039e12),
}


def chips_of(mesh: Mesh) -> float:
    """Returns how many chips the devices of a mesh are; a device that is not in CHIPS counts as one."""
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    return mesh.size / (chip.devices if chip else 1)


def find_chip(device_kind: str) -> Chip:
    """Returns the peaks of one device.

    Raises:
        InputError: there is no such chip in CHIPS.
    """
    if device_kind not in CHIPS:
        raise InputError(f"{device_kind}: its peaks are not known here; those of {', '.join(CHIPS)} are")
    chip = CHIPS[device_kind]
    return Chip(chip.flops / chip.devices, chip.memory / chip.devices, chip.bandwidth / chip.devices)
