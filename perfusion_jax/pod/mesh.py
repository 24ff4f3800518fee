"""The mesh of a job's devices, and how arrays lie on it.

A mesh has two axes. The frozen weights lie whole on every device.

    concept    members of a fleet; nothing is ever sent along it
    data       samples of one member's batch
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from perfusion_jax.runtime.errors import InputError

AXES = ("concept", "data")


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges all devices of the job.

    Args:
        shape: sizes along AXES; one of them may be -1 and takes what the others leave.
        devices: others than the job's, to compile for.

    Raises:
        InputError: the devices cannot be arranged so.
    """
    count = len(devices or jax.devices())
    sizes = list(shape)
    if len(sizes) == len(AXES) and sizes.count(-1) == 1:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = count // rest if rest else 0
    if len(sizes) != len(AXES) or min(sizes) < 1 or np.prod(sizes) != count:
        raise InputError(
            f"config.mesh is {tuple(shape)}; it must be the sizes of {' and '.join(AXES)}, their product {count}, the "
            "number of devices; one of them may be -1"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def whole(mesh: Mesh) -> NamedSharding:
    """Of arrays that lie whole on every device."""
    return NamedSharding(mesh, P())


def place(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays that every process has on all devices of a mesh, each process on its own."""

    def put(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, whole(mesh), lambda index: host[index])

    return jax.tree.map(put, tree)


def submesh_view(tree: Any, mesh: Mesh) -> Any:
    """Takes arrays that lie whole on every device of a job as arrays over a mesh of some of them, without copying.

    Args:
        tree: of arrays.
        mesh: of devices of this process.

    Returns:
        The same tree, whole on each device of the mesh.
    """

    def gather(leaf: jax.Array) -> jax.Array:
        parts = {part.device: part.data for part in leaf.addressable_shards}
        here = [parts[device] for device in mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(leaf.shape, whole(mesh), here)

    return jax.tree.map(gather, tree)
