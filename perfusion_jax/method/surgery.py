"""Rank-1 edits as transforms of a parameter tree.

The cross-attention layers are the subtrees called `attn2`; they are found in the tree, never listed, so any UNet
with this name works. `insert` adds leaves beside the frozen kernels, which stay the very same arrays:

    params["concept_edit"]                      Edit: i*, its duals and the gates, shared by all layers
    params[...]["attn2"]["to_k"]["kernel"]      W_K, frozen
    params[...]["attn2"]["to_k"]["target_outputs"]    o*_K, [num_concepts, out_width]
    params[...]["attn2"]["to_v"]...             likewise

All functions are pure and work under `jit`, `grad` and `vmap`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from perfusion_jax.method import concept as concept_lib
from perfusion_jax.method.concept import Concept
from perfusion_jax.method.edit import Edit, Factors, Gate, baked_change, edited_input
from perfusion_jax.method.edit import bake as bake_kernel

Params = dict[str, Any]

EDIT = "concept_edit"
TARGET_OUTPUTS = "target_outputs"


def cross_attention_layers(unet_params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the cross-attention subtrees by path, such as `mid_block/attentions_0/transformer_blocks_0/attn2`.

    Raises:
        ValueError: there are none.
    """
    layers: dict[str, Any] = {}

    def visit(tree: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for name, branch in tree.items():
            if name == "attn2":
                layers["/".join((*path, name))] = branch
            elif isinstance(branch, Mapping):
                visit(branch, (*path, name))

    visit(unet_params, ())
    if not layers:
        raise ValueError("this parameter tree has no cross-attention: no subtree of it is called 'attn2'")
    return layers


def is_edited(path: Sequence[str]) -> bool:
    """Whether an edit changes what stands at a path of the tree, such as `(..., "attn2", "to_k", "kernel")`."""
    return "attn2" in path and path[-1] == "kernel" and path[-2] in ("to_k", "to_v")


def insert(unet_params: Params, concepts: Concept | Sequence[Concept], gates: Gate | Sequence[Gate]) -> Params:
    """Puts gated rank-1 edits beside the cross-attention kernels.

    Args:
        unet_params: the frozen UNet, without edits.
        concepts: one concept, several, or several already stacked along a leading axis.
        gates: the gate of each concept, or one for all.

    Returns:
        A new tree; every leaf of the old one is in it, unchanged. With no concepts, the old tree.

    Raises:
        ValueError: the tree already has an edit, a concept was made for another UNet, or a gate is impossible.
    """
    _refuse_edited(unet_params)
    if not isinstance(concepts, Concept) and not concepts:
        return unet_params
    stacked, edit = _stack(unet_params, concepts, gates)
    edited = _change_projections(
        unet_params, stacked, lambda weights, target_outputs: {**weights, TARGET_OUTPUTS: target_outputs}
    )
    return {**edited, EDIT: edit}


def remove(unet_params: Params) -> Params:
    """Takes all edits out: the tree before `insert`, with the very same leaves."""
    return {
        name: remove(branch) if isinstance(branch, dict) else branch
        for name, branch in unet_params.items()
        if name not in (EDIT, TARGET_OUTPUTS)
    }


def bake(
    unet_params: Params, concepts: Concept | Sequence[Concept], strength: Float[Array, "*concepts"] | float = 1.0
) -> Params:
    """Folds ungated edits into plain kernels: W' = W + g (o* - W i*) (C^-1 i*)^T / <i*, i*> for one concept.

    Args:
        unet_params: the frozen UNet, without edits.
        concepts: as for `insert`.
        strength: g, one for all concepts or [num_concepts].

    Returns:
        A tree of the same structure, dtypes and shapes, with other `attn2` kernels.

    Raises:
        ValueError: as for `insert`.
    """
    _refuse_edited(unet_params)
    if not isinstance(concepts, Concept) and not concepts:
        return unet_params
    stacked, edit = _stack(unet_params, concepts, Gate(bias=0.0, temperature=1.0, strength=strength))
    return _change_projections(
        unet_params,
        stacked,
        lambda weights, target_outputs: {**weights, "kernel": bake_kernel(weights["kernel"], edit, target_outputs)},
    )


def baked_changes(
    unet_params: Params, concepts: Concept | Sequence[Concept], strength: Float[Array, "*concepts"] | float = 1.0
) -> dict[str, Factors]:
    """Returns what `bake` adds to each kernel, as factors: by path, such as `mid_block/.../attn2/to_k/kernel`.

    Args:
        unet_params, concepts, strength: as for `bake`, at least one concept.

    Raises:
        ValueError: as for `insert`.
    """
    _refuse_edited(unet_params)
    stacked, edit = _stack(unet_params, concepts, Gate(bias=0.0, temperature=1.0, strength=strength))
    return {
        f"{layer}/{projection}/kernel": baked_change(weights[projection]["kernel"], edit, outputs[layer])
        for layer, weights in cross_attention_layers(unet_params).items()
        for projection, outputs in (("to_k", stacked.key_outputs), ("to_v", stacked.value_outputs))
    }


def fitted_strengths(
    unet_params: Params,
    concepts: Concept | Sequence[Concept],
    gates: Gate | Sequence[Gate],
    encodings: Float[Array, "tokens context"],
) -> Float32[Array, " concepts"]:
    """Returns the strengths at which the baked edit is nearest to the gated one, by least squares.

    What the gated edit at strength 1 adds to each projection of each encoding is approached by a sum of what baking
    each concept adds; every projection counts alike, in units of what the frozen weights give.

    Args:
        unet_params, concepts, gates: as for `insert`, at least one concept.
        encodings: text encodings of prompts that name the concepts, one below the other.

    Raises:
        ValueError: as for `insert`.
    """
    _refuse_edited(unet_params)
    stacked, edit = _stack(unet_params, concepts, gates)
    edit = edit._replace(gates=edit.gates._replace(strength=jnp.ones_like(edit.gates.strength)))
    encodings = encodings.astype(jnp.float32)
    edited = edited_input(edit, encodings)
    # In float64 on the host: on a TPU a difference of two products would be that of their rounding.
    exact = np.asarray(encodings, np.float64)
    taken, activations = (
        exact - np.asarray(edited.perpendicular, np.float64),
        np.asarray(edited.activations, np.float64),
    )
    count = len(stacked.target_input)
    normal, right = np.zeros((count, count)), np.zeros(count)
    for layer, weights in cross_attention_layers(unet_params).items():
        for projection, outputs in (("to_k", stacked.key_outputs), ("to_v", stacked.value_outputs)):
            kernel = weights[projection]["kernel"]
            frozen = np.asarray(kernel, np.float64)
            gated = activations @ np.asarray(outputs[layer], np.float64) - taken @ frozen
            down, up = (np.asarray(factor, np.float64) for factor in baked_change(kernel, edit, outputs[layer]))
            baked = (exact @ down.T)[:, :, None] * up
            unit = np.square(exact @ frozen).mean()
            normal += np.einsum("ejo,eko->jk", baked, baked) / unit
            right += np.einsum("ejo,eo->j", baked, gated) / unit
    # From 1, which stays where baking adds nothing.
    return jnp.asarray(1 + np.linalg.lstsq(normal, right - normal.sum(axis=1))[0], jnp.float32)


def _change_projections(
    unet_params: Params, stacked: Concept, change: Callable[[Params, Float32[Array, "concepts out"]], Params]
) -> Params:
    """Replaces each cross-attention projection by what `change` makes of its weights and its target outputs."""
    for layer, weights in cross_attention_layers(unet_params).items():
        changed = {
            **weights,
            "to_k": change(weights["to_k"], stacked.key_outputs[layer]),
            "to_v": change(weights["to_v"], stacked.value_outputs[layer]),
        }
        unet_params = _replace(unet_params, layer.split("/"), changed)
    return unet_params


def _replace(tree: Params, path: Sequence[str], branch: Params) -> Params:
    """Returns a tree with another branch at `path`; all other leaves are the very same."""
    name, *rest = path
    return {**tree, name: _replace(tree[name], rest, branch) if rest else branch}


def _refuse_edited(unet_params: Params) -> None:
    if EDIT in unet_params:
        raise ValueError("this parameter tree already has an edit: remove() it, and give all concepts at once")


def _stack(
    unet_params: Params, concepts: Concept | Sequence[Concept], gates: Gate | Sequence[Gate]
) -> tuple[Concept, Edit]:
    if isinstance(concepts, Concept):
        single = concepts.target_input.ndim == 1
        stacked = concept_lib.stack([concepts]) if single else concepts
    else:
        stacked = concept_lib.stack(concepts)
    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stacked)
    _check_layers(unet_params, stacked)
    count = stacked.target_input.shape[0]
    if not isinstance(gates, Gate):
        gates = Gate(*(jnp.stack([jnp.asarray(field) for field in fields]) for fields in zip(*gates, strict=True)))
    gates = Gate(*(_per_concept(name, field, count) for name, field in gates._asdict().items()))
    return stacked, Edit(stacked.target_input, stacked.dual, gates)


def _check_layers(unet_params: Params, stacked: Concept) -> None:
    layers = cross_attention_layers(unet_params)
    for projection, outputs in (("to_k", stacked.key_outputs), ("to_v", stacked.value_outputs)):
        if layers.keys() != outputs.keys():
            raise ValueError(
                f"the concept was made for another UNet: layers {sorted(layers.keys() - outputs.keys())} are missing "
                f"from it, layers {sorted(outputs.keys() - layers.keys())} are not in the UNet"
            )
        for layer, weights in layers.items():
            wanted, given = weights[projection]["kernel"].shape, (stacked.dual.shape[-1], outputs[layer].shape[-1])
            if wanted != given:
                raise ValueError(f"the concept was made for another UNet: {layer} maps {wanted}, the concept {given}")


def _per_concept(name: str, values: Float[Array, "*concepts"] | float, count: int) -> Float32[Array, " {count}"]:
    array = jnp.asarray(values, jnp.float32)
    if name == "temperature" and not isinstance(array, jax.core.Tracer) and not (array > 0).all():
        raise ValueError(f"temperature is {values}: it must be above 0")
    if array.ndim > 1 or array.size not in (1, count):
        raise ValueError(f"{name} has shape {array.shape}: give one value, or one for each of the {count} concepts")
    return jnp.broadcast_to(array.reshape(-1), (count,))
