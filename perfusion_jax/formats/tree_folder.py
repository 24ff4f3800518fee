"""A UNet's parameter tree with concepts in it, as an Orbax checkpoint that plain Orbax and Flax restore.

    FOLDER/tree                 Orbax: {"unet": the tree, "words": float32 [num_concepts, token_width]}
    FOLDER/perfusion_jax.json   the concepts' cards, whether the edit is baked, and the base model

The tree is baked: plain kernels, as Flax's UNet2DConditionModel has them. Or it is gated: as `surgery.insert` leaves
it, the frozen kernels and beside them `target_outputs`, and `concept_edit` with the target inputs, their duals and the
gates. `words` are the concepts' word embeddings.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from perfusion_jax.base_model import BaseModel
from perfusion_jax.formats.concept_file import TrainedConcept, card_from
from perfusion_jax.method.concept import Concept
from perfusion_jax.method.edit import Gate
from perfusion_jax.method.surgery import EDIT, TARGET_OUTPUTS, Params, bake, cross_attention_layers, insert, remove
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import storage_errors, to_path, write_bytes

FORMAT = "perfusion_jax tree 1"
RECORD = "perfusion_jax.json"
TREE = "tree"
_RECORD_KEYS = {"baked": bool, "base_model": str, "concepts": list}


def write_tree(
    folder: epath.Path,
    base: BaseModel,
    concepts: Sequence[TrainedConcept],
    strengths: Sequence[float],
    baked: bool,
    dtype: str,
) -> None:
    """Writes a tree.

    Arrays are written as they are laid out over devices: shard `base.params` first to write from many.

    Args:
        folder: an empty one, local or in a bucket.
        base: the model that the concepts were trained on.
        concepts: at least one.
        strengths: of each, where they are baked.
        baked: whether the edit is folded into the kernels, and the gate lost.
        dtype: of the kernels; what belongs to the edit stays float32.

    Raises:
        InputError: a number does not fit into the dtype.
        InputError, UnavailableError: it cannot be written.
    """
    learnt, cards = [concept for concept, _ in concepts], [card for _, card in concepts]
    unet = jax.tree.map(lambda leaf: leaf.astype(dtype), base.params["unet"])
    if baked:
        unet = bake(unet, learnt, jnp.asarray(strengths, jnp.float32))
    else:
        unet = insert(unet, learnt, [Gate(card.bias, card.temperature) for card in cards])
        edit = unet[EDIT]
        unet = {**unet, EDIT: {**edit._asdict(), "gates": edit.gates._asdict()}}
    tree = {"unet": unet, "words": jnp.stack([jnp.asarray(concept.embedding, jnp.float32) for concept in learnt])}
    for path, leaf in jax.tree.leaves_with_path(unet):
        if not jnp.isfinite(leaf).all():  # where it lies: it may be on many devices
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(f"{name} has numbers that {dtype} cannot hold: ask for bfloat16 or float32")
    with storage_errors(folder, "written"), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / TREE, tree, force=True)
    record = {
        "format": FORMAT,
        "baked": baked,
        "base_model": base.name,
        "concepts": [dataclasses.asdict(card) for card in cards],
    }
    write_bytes(folder / RECORD, json.dumps(record, indent=2).encode())


def load_tree(folder: str | Path, base: BaseModel) -> tuple[BaseModel, list[TrainedConcept]]:
    """Reads a tree.

    Args:
        folder: that `write_tree` wrote, local or in a bucket.
        base: the model that its concepts were trained on.

    Returns:
        The model with the tree's kernels, in its own dtype; and the concepts. Of a baked tree these are the words
        alone: their edit is zero, which acts on nothing.

    Raises:
        InputError: it is none, or of another base model.
        UnavailableError: storage fails.
    """
    path = to_path(folder)
    record = _read_record(path)
    cards = [card_from(path / RECORD, card) for card in record["concepts"]]
    if not all(base.has_fingerprint(card.fingerprint) for card in cards):
        raise InputError(
            f"{folder}: a tree of {record['base_model']}, which {base.name} is not: give --base "
            f"{record['base_model']}, or a copy of it"
        )
    # Where it was written says nothing of where it is read.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with storage_errors(path, "read"), ocp.StandardCheckpointer() as checkpointer:
        leaves = checkpointer.metadata(path / TREE).item_metadata.tree
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), leaves)
        tree = checkpointer.restore(path / TREE, target)
    unet = jax.tree.map(jnp.asarray, tree["unet"])
    kernels = jax.tree.map(lambda leaf: leaf.astype(base.model.dtype), remove(unet))
    words = tree["words"]
    concepts = [base.model.word_alone(word) for word in words] if record["baked"] else _concepts(unet, words)
    learnt = [TrainedConcept(concept, card) for concept, card in zip(concepts, cards, strict=True)]
    return dataclasses.replace(base, params={**base.params, "unet": kernels}), learnt


def _read_record(folder: epath.Path) -> dict[str, Any]:
    file = folder / RECORD
    with storage_errors(file, "read"):
        try:
            record = json.loads(file.read_text())
        except FileNotFoundError as error:
            raise InputError(f"{folder}: no {RECORD} in it: not an exported tree") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: not JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{file}: not of the format {FORMAT!r}")
    for key, kind in _RECORD_KEYS.items():
        if not isinstance(record.get(key), kind):
            raise InputError(f"{file}: {key} is missing, or not what it must be: export the tree anew")
    return record


def _concepts(unet: Params, words: np.ndarray) -> list[Concept]:
    """The concepts of a gated tree."""
    edit: Mapping[str, Any] = unet[EDIT]
    layers = cross_attention_layers(unet)
    stacked = Concept(
        embedding=jnp.asarray(words),
        target_input=edit["target_inputs"],
        dual=edit["duals"],
        key_outputs={layer: weights["to_k"][TARGET_OUTPUTS] for layer, weights in layers.items()},
        value_outputs={layer: weights["to_v"][TARGET_OUTPUTS] for layer, weights in layers.items()},
    )
    return [jax.tree.map(lambda leaf, number=number: leaf[number], stacked) for number in range(len(words))]
