"""A concept on disk: one safetensors file, of about 100 KB for Stable Diffusion 1 and 2, and 700 KB for XL.

Tensors, all float32: `embedding` (for several text encoders one after the other), `target_input`, `dual`, and per
cross-attention layer `key_outputs.LAYER` and `value_outputs.LAYER`, where LAYER is the module path of PyTorch
diffusers, such as `mid_block.attentions.0.transformer_blocks.0.attn2`. What is not an array is string metadata.
What other methods learn (`method.baselines`) is kept likewise: `embedding`, and `down.PATH` and `up.PATH`, or
`added.PATH`.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load

from perfusion_jax.base_model import BaseModel
from perfusion_jax.formats.tensor_file import read_header, tensor_bytes
from perfusion_jax.method.baselines import BASELINES, Learnt
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import entries, storage_errors, to_path, write_bytes
from perfusion_jax.runtime.names import PLACEHOLDER

_OURS = "perfusion_jax concept "
FORMAT = f"{_OURS}1"
FORMER = "renamed_from"  # metadata of a file that was given another name
PERFUSION = "perfusion"
"""What cards call the method itself; others are keys of `method.baselines.BASELINES`."""


@dataclass(frozen=True)
class ConceptCard:
    """What a concept file says of its concept.

    Attributes:
        name: of the concept; prompts call it `<name>`.
        super_category: the word or words for this kind of thing, to which the keys are locked.
        base_model: name of the model it was trained on, for people.
        fingerprint: of that model's cross-attention weights (`BaseModel.fingerprint`), for checking.
        bias: beta that suits the concept at generation.
        temperature: tau that suits it.
        guidance_scale: that suits it and its base model.
        step: training steps taken.
        licence: of the pictures it was learnt from, or empty.
        method: by which it was learnt, as `config.method`.
        class_noun: whether prompts name its kind after its name, `<name> dog`.
        lock_keys: whether its keys are those of its super-category, as Perfusion's are.
    """

    name: str
    super_category: str
    base_model: str
    fingerprint: tuple[float, ...]
    bias: float
    temperature: float
    guidance_scale: float
    step: int
    licence: str = ""
    method: str = PERFUSION
    class_noun: bool = False
    lock_keys: bool = True

    @property
    def placeholder(self) -> str:
        """The token that stands for the concept in a prompt, `<name>`."""
        return f"<{self.name}>"

    @property
    def phrase(self) -> str:
        """What prompts call the concept: `<name>`, or `<name> dog`."""
        return f"{self.placeholder} {self.super_category}" if self.class_noun else self.placeholder


AnyLearnt = TypeVar("AnyLearnt", bound=Learnt)


class TrainedConcept(NamedTuple, Generic[AnyLearnt]):
    """A concept, learnt by Perfusion or another method, and what its file says of it."""

    concept: AnyLearnt
    card: ConceptCard


def save_concept(file: str | Path, concept: Learnt, card: ConceptCard) -> None:
    """Writes a concept, all at once or not at all.

    Raises:
        InputError, UnavailableError: the file cannot be written.
        InputError: `concept` is several stacked ones.
    """
    if concept.embedding.ndim != 1:
        raise InputError(f"{file}: {len(concept.embedding)} stacked concepts; a file holds one")
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in by_name(concept).items()}
    write_bytes(file, tensor_bytes(tensors, _metadata(card)))


def read_card(file: str | Path) -> ConceptCard:
    """Reads what a concept file says of its concept.

    Raises:
        InputError: no such file, not a concept, or damaged.
        UnavailableError: storage fails.
    """
    return _read(to_path(file))[0]


def write_renamed(file: str | Path, target: str | Path, name: str) -> None:
    """Writes a copy of a concept file that gives its concept another name.

    Raises:
        InputError, UnavailableError: the file cannot be read, or the copy cannot be written.
    """
    card, tensors = _read(to_path(file))
    metadata = _metadata(dataclasses.replace(card, name=name)) | {FORMER: json.dumps(digests(file))}
    write_bytes(target, tensor_bytes(tensors, metadata))


def digests(file: str | Path) -> list[str]:
    """SHA-256 of a concept file, and of what it was before it was given other names.

    Raises:
        InputError, UnavailableError: it cannot be read.
    """
    data = read_file(file)
    try:
        former = json.loads(read_header(data).get("__metadata__", {}).get(FORMER, "[]"))
    except ValueError:
        former = []
    return [hashlib.sha256(data).hexdigest(), *(str(each) for each in former if isinstance(former, list))]


def _metadata(card: ConceptCard) -> dict[str, str]:
    return {"format": FORMAT, **{key: json.dumps(value) for key, value in dataclasses.asdict(card).items()}}


def load_concept(file: str | Path, base: BaseModel) -> TrainedConcept:
    """Reads a concept that was trained on `base`.

    Raises:
        InputError: no such file, not a concept, damaged, or trained on another base model.
        UnavailableError: storage fails.
    """
    card, tensors = _read(to_path(file))
    if not base.has_fingerprint(card.fingerprint):
        raise InputError(
            f"{file}: trained on the base model {card.base_model}, which {base.name} is not: give --base "
            f"{card.base_model}, or a copy of it"
        )
    return TrainedConcept(_concept(to_path(file), card.method, tensors, base), card)


def read_file(file: str | Path) -> bytes:
    """Reads a concept file as it is.

    Raises:
        InputError: no such file, or a folder, in which case the concepts in it are named.
        UnavailableError: storage fails.
    """
    path = to_path(file)
    with storage_errors(path, "read"):
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise InputError(f"{file}: no such concept file") from error
        except IsADirectoryError as error:
            files = [*(entries(path) or ()), *(entries(path / "concepts") or ())]
            inside = [file for file in files if file.suffix == ".safetensors"]
            hint = f"give one of its files: {', '.join(map(str, inside[:5]))}" if inside else "no concepts in it"
            raise InputError(f"{file}: a folder, and not a concept file; {hint}") from error


def _read(file: epath.Path) -> tuple[ConceptCard, dict[str, np.ndarray]]:
    data = read_file(file)
    try:
        tensors = load(data)
        metadata = read_header(data).get("__metadata__", {})  # `load` has checked it
    except SafetensorError as error:
        raise InputError(f"{file}: not a complete safetensors file ({error})") from error
    except KeyError as error:  # NumPy has no such numbers
        _refuse_lora(file, read_header(data))
        raise InputError(f"{file}: its numbers are {error.args[0]}; a concept's are float32") from error
    _refuse_lora(file, tensors)
    if metadata.get("format", "").startswith(_OURS) and metadata["format"] != FORMAT:
        raise InputError(
            f"{file}: of a newer version of perfusion_jax: its format is {metadata['format']!r}, and this one reads "
            f"{FORMAT!r}: install the newer one"
        )
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{file}: not a concept of perfusion_jax: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    return _card(file, metadata), tensors


def _refuse_lora(file: epath.Path, names: Iterable[str]) -> None:
    if any("lora" in name for name in names):
        raise InputError(
            f"{file}: a LoRA, and not a concept: it has no target input and no gate, and cannot be made into one; give "
            "the concept file that it was exported from"
        )


def card_from(file: epath.Path, written: Mapping[str, Any]) -> ConceptCard:
    """A card from what a file says.

    Args:
        file: for messages.
        written: by the names of a card's fields, what `json.loads` gave.

    Raises:
        InputError: something is missing, or is not what it must be.
    """
    try:
        # Older files say nothing of these.
        fields = {"method": PERFUSION, "class_noun": False, "lock_keys": True, **written}
        fields = {field.name: fields[field.name] for field in dataclasses.fields(ConceptCard)}
        if fields["method"] not in (PERFUSION, *BASELINES):
            raise ValueError(f"method is {fields['method']!r}")
        for key in ("class_noun", "lock_keys"):
            if not isinstance(fields[key], bool):
                raise TypeError(f"{key} is {fields[key]!r}")
        for key in ("name", "super_category", "base_model", "licence"):
            if not isinstance(fields[key], str):
                raise TypeError(f"{key} is {fields[key]!r}")
        # It names files and folders, too: no path may be one.
        if not PLACEHOLDER.fullmatch(f"<{fields['name']}>"):
            raise ValueError(f"name is {fields['name']!r}")
        numbers = {key: float(fields[key]) for key in ("bias", "temperature", "guidance_scale")}
        if not all(map(isfinite, numbers.values())):
            raise ValueError(f"not finite: {numbers}")
        fingerprint = tuple(float(number) for number in fields["fingerprint"])
        return ConceptCard(**{**fields, **numbers, "fingerprint": fingerprint, "step": int(fields["step"])})
    except KeyError as error:
        raise InputError(f"{file}: the metadata {error} is missing") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{file}: its metadata cannot be read ({error})") from error


def _card(file: epath.Path, metadata: Mapping[str, str]) -> ConceptCard:
    names = [field.name for field in dataclasses.fields(ConceptCard)]
    try:
        written = {name: json.loads(metadata[name]) for name in names if name in metadata}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: its metadata cannot be read ({error})") from error
    return card_from(file, written)


def _concept(file: epath.Path, method: str, tensors: dict[str, np.ndarray], base: BaseModel) -> Learnt:
    template: Learnt
    if method in BASELINES:
        ranks = [tensor.shape[-1] for name, tensor in tensors.items() if name.startswith("down.") and tensor.ndim]
        template = base.model.baseline_shapes(method, ranks[0] if ranks else 1)
    else:
        template = base.model.new_concept_shapes()
    expected = by_name(template)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is not known" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        if tensors[name].shape != expected[name].shape:
            problems.append(f"{name} has shape {tensors[name].shape} instead of {expected[name].shape}")
        elif not np.isfinite(tensors[name]).all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise InputError(f"{file}: damaged: " + "; ".join(problems))

    names = jax.tree.unflatten(jax.tree.structure(template), _names(template))
    return jax.tree.map(lambda name: jnp.asarray(tensors[name], jnp.float32), names)


def _names(concept: Learnt) -> list[str]:
    """Of the tensors, in the order of the leaves: Flax's paths as PyTorch's, `key_outputs.mid_block.attentions.0`."""
    paths = [path for path, _ in jax.tree.leaves_with_path(concept)]
    flax_names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    # Numbers count modules of one list, but for the `linear_1` of an embedding of time, whose name it is.
    return [re.sub(r"(?<!linear)_(\d+)(?=/|$)", r".\1", name).replace("/", ".") for name in flax_names]


def by_name(concept: Learnt) -> dict[str, Any]:
    """The arrays of a concept, by their names in a file."""
    return dict(zip(_names(concept), jax.tree.leaves(concept), strict=True))
