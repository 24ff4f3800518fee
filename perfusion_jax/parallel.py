"""Many concepts at once on many chips: the mesh, what is split over it, and the fleet's step.

A mesh has three axes:

    concept    members of the fleet; nothing is ever sent along it
    data       samples of one member's batch
    fsdp       samples too, and the frozen weights; the first chip of each host holds these whole besides

A round of a fleet is the state of its members stacked along a leading axis: slot i of every array is member i's. A slot
without a member holds zeros and takes no step.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from perfusion_jax import training
from perfusion_jax.base_model import BaseModel
from perfusion_jax.data.examples import Examples
from perfusion_jax.errors import InputError, out_of_memory
from perfusion_jax.training import Batch, Learning, Settings

AXES = ("concept", "data", "fsdp")

# The axis of a frozen weight that is split over fsdp, by the end of its path; all others are on every chip.
SPLIT = ((r"kernel$", -1), (r"token_embedding/embedding$", 0))

# Parts of the frozen model that the step reads.
STEP_PARAMS = ("text_encoder", "unet")

MEMORY_ADVICE = (
    "raise config.accumulation, or in a fleet lower config.members or split over more chips by the axes data and fsdp "
    "of config.mesh"
)


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
            f"config.mesh is {tuple(shape)}; it must be the sizes of {', '.join(AXES)}, their product {count}, the "
            "number of devices; one of them may be -1"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def member_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays with a leading axis of slots."""
    return NamedSharding(mesh, P("concept"))


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """How the frozen weights lie: by SPLIT where fsdp divides that axis, else whole on every chip."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, axis in SPLIT:
            if re.search(pattern, name) and leaf.shape[axis] % mesh.shape["fsdp"] == 0:
                spec: list[str | None] = [None] * leaf.ndim
                spec[axis] = "fsdp"
                return NamedSharding(mesh, P(*spec))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, params)


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays that every process has whole on the devices, each process on its own."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def on_each(tree: Any, mesh: Mesh) -> Any:
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
        return jax.make_array_from_single_device_arrays(leaf.shape, NamedSharding(mesh, P()), here)

    return jax.tree.map(gather, tree)


def check_split(settings: Settings, mesh: Mesh) -> None:
    """Checks that the mesh can split a batch.

    Raises:
        InputError: it cannot, evenly.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if settings.batch_size // settings.accumulation % ways:
        raise InputError(
            f"config.batch_size is {settings.batch_size}, in {settings.accumulation} parts; the axes data and fsdp of "
            f"config.mesh split each part in {ways}, which must divide it"
        )


def make_fleet_step(base: BaseModel, settings: Settings, mesh: Mesh) -> Callable[..., tuple[Learning, jax.Array]]:
    """Compiles, when called or lowered, one optimiser step of every member: `jax.vmap` of `training.train_step`.

    Args:
        base: the model's architecture.
        settings: how all of them learn.
        mesh: from `make_mesh`.

    Returns:
        A jitted function of (params, whitening, members, learning): the frozen weights (of STEP_PARAMS alone, as
        `param_shardings` lays them), C^-1/2, `Members`, and the stacked `Learning`, whose buffers it takes. It returns
        (the state after, losses before the step, float32 [slots]). A member that has taken its steps, or whose loss is
        not finite, stays what it was, and its loss is NaN.

    Raises:
        InputError: a batch cannot be split evenly.
    """
    check_split(settings, mesh)
    samples = NamedSharding(mesh, P(None, ("data", "fsdp")))

    def split(parts: Batch) -> Batch:
        return jax.lax.with_sharding_constraint(parts, samples)

    def member_step(
        params: Any, whitening: jax.Array, member: Members, learning: Learning
    ) -> tuple[Learning, jax.Array]:
        key = jax.random.wrap_key_data(member.keys)
        after, loss = training.train_step(base, params, whitening, member.examples, learning, key, settings, split)
        done = learning.step >= member.limits
        kept = jax.tree.map(lambda old, new: jnp.where(done, old, new), learning, after)
        return kept, jnp.where(done, jnp.nan, loss)

    by_member, whole = member_sharding(mesh), NamedSharding(mesh, P())
    fleet_step = jax.vmap(member_step, in_axes=(None, None, 0, 0), spmd_axis_name="concept")

    def gathered_step(
        params: Any, whitening: jax.Array, members: Members, learning: Learning
    ) -> tuple[Learning, jax.Array]:
        # Without this the compiler would rather send activations around than the weights, several times each.
        params = jax.lax.with_sharding_constraint(params, whole)
        # Attention's kernel on TPUs asks for the mesh: XLA cannot split it by itself.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fleet_step(params, whitening, members, learning)

    return jax.jit(
        gathered_step,
        in_shardings=(
            param_shardings({name: base.params[name] for name in STEP_PARAMS}, mesh),
            whole,
            by_member,
            by_member,
        ),
        out_shardings=(by_member, by_member),
        donate_argnums=3,
    )


def member_shapes(
    base: BaseModel, settings: Settings, pictures: int, prompts: int, side: int
) -> tuple[Members, Learning]:
    """Shapes and dtypes of one member, without the axis of slots, as `jax.ShapeDtypeStruct`.

    Args:
        base: the model.
        settings: how it learns.
        pictures: that the examples are padded to.
        prompts: of each picture.
        side: of the pictures, in pixels.
    """

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    latents = side // base.vae_factor
    one = array(dtype=jnp.int32)
    examples = Examples(
        mean=array(pictures, 2, latents, latents, base.latent_channels),
        std=array(pictures, 2, latents, latents, base.latent_channels),
        masks=array(pictures, 2, latents, latents),
        prompt_ids=array(pictures, prompts, base.tokenizer.length, dtype=jnp.int32),
        num_pictures=one,
    )
    keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    learning = jax.eval_shape(lambda concept: training.start(concept, settings), base.new_concept_shapes())
    return Members(examples, keys, one), learning


def step_shapes(base: BaseModel, shapes: tuple[Members, Learning], slots: int) -> tuple[Any, ...]:
    """Shapes of all arguments of the fleet's step, to lower it with.

    Args:
        base: the model.
        shapes: of one member, from `member_shapes`.
        slots: members at once.
    """
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((slots, *leaf.shape), leaf.dtype), shapes)
    params = jax.eval_shape(lambda tree: tree, {name: base.params[name] for name in STEP_PARAMS})
    width = base.context_width
    return params, jax.ShapeDtypeStruct((width, width), jnp.float32), *stacked


def pad_pictures(examples: Examples, pictures: int) -> Examples:
    """Adds pictures of zeros, which are never drawn, up to a number of them; on the host."""

    def pad(array: Any) -> np.ndarray:
        host = np.asarray(array)
        return np.pad(host, [(0, pictures - len(host)), *[(0, 0)] * (host.ndim - 1)])

    padded = {name: pad(field) for name, field in examples._asdict().items() if name != "num_pictures"}
    return Examples(**padded, num_pictures=np.asarray(examples.num_pictures))  # type: ignore[arg-type]


def slot_owners(mesh: Mesh, slots: int) -> tuple[list[int], list[int]]:
    """Which slots are whose.

    Returns:
        (slots that lie on devices of this process; those of them that it writes and reports: where several processes
        share a slot, the first of them does).
    """
    holders: dict[int, set[int]] = {slot: set() for slot in range(slots)}
    for device, (index,) in member_sharding(mesh).devices_indices_map((slots,)).items():
        for slot in range(*index.indices(slots)):
            holders[slot].add(device.process_index)  # type: ignore[attr-defined]
    here = jax.process_index()
    held = [slot for slot, processes in holders.items() if here in processes]
    return held, [slot for slot in held if min(holders[slot]) == here]


def stack_members(rows: Mapping[int, Any], shapes: Any, slots: int, mesh: Mesh) -> Any:
    """Stacks members over all processes; each gives those of its own slots.

    Args:
        rows: a tree of arrays for each slot of this process that has a member.
        shapes: of such a tree; slots without a member become zeros.
        slots: of the round.
        mesh: the fleet's.
    """
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    leaves = {slot: jax.tree.leaves(tree) for slot, tree in rows.items()}
    blanks, structure = jax.tree.flatten(empty)

    def stack(number: int, blank: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            chosen = range(*index[0].indices(slots))
            return np.stack([np.asarray(leaves[slot][number]) if slot in leaves else blank for slot in chosen])

        return jax.make_array_from_callback((slots, *blank.shape), member_sharding(mesh), part)

    return jax.tree.unflatten(structure, [stack(number, blank) for number, blank in enumerate(blanks)])


def read_members(stacked: Any, wanted: Sequence[int]) -> dict[int, Any]:
    """Copies members of this process's slots to the host: a tree of NumPy arrays for each slot wanted."""
    leaves, structure = jax.tree.flatten(stacked)
    rows: dict[int, list[np.ndarray]] = {slot: [] for slot in wanted}
    for leaf in leaves:
        found: dict[int, np.ndarray] = {}
        for shard in leaf.addressable_shards:
            first = shard.index[0].start or 0
            for slot in wanted:
                if slot not in found and first <= slot < first + shard.data.shape[0]:
                    found[slot] = np.asarray(shard.data[slot - first])
        for slot in wanted:
            rows[slot].append(found[slot])
    return {slot: jax.tree.unflatten(structure, row) for slot, row in rows.items()}


def bytes_per_chip(compiled: jax.stages.Compiled) -> int:
    """Memory that a compiled step takes on each chip at its peak, as the compiler reports it."""
    report: Any = compiled.memory_analysis()
    return int(
        report.argument_size_in_bytes
        + report.output_size_in_bytes
        - report.alias_size_in_bytes
        + report.temp_size_in_bytes
        + report.generated_code_size_in_bytes
    )


def most_that_fit(bytes_for: Callable[[int], int], limit: int, most: int) -> int:
    """How many members fit at each place of the concept axis.

    Memory grows by about the same for every member: two compilations tell how much, and one more makes sure.

    Args:
        bytes_for: memory per chip that so many members take; the TPU's compiler raises `jax.errors.JaxRuntimeError`
            instead where it is more than there is.
        limit: of what there is room for on a chip, bytes.
        most: more than so many are not wanted.

    Raises:
        InputError: not even one fits.
        jax.errors.JaxRuntimeError: likewise, by the compiler's word.
    """

    one = bytes_for(1)
    if one > limit:
        raise InputError(
            f"one concept takes {one / 1e9:.1f} GB of a chip, where there is room for {limit / 1e9:.1f} GB: "
            f"{MEMORY_ADVICE}"
        )
    if most == 1:
        return 1
    count = min(most, 1 + int((limit - one) / max(1, _taken(bytes_for, 2) - one)))
    while count > 1 and not fits(bytes_for, limit, count):
        count -= max(1, count // 16)
    return count


def fits(bytes_for: Callable[[int], int], limit: int, members: int) -> bool:
    """Whether so many members fit at each place of the concept axis; arguments as for `most_that_fit`."""
    return _taken(bytes_for, members) <= limit


def _taken(bytes_for: Callable[[int], int], members: int) -> float:
    try:
        return bytes_for(members)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return math.inf
