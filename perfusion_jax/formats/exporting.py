"""Concepts in the formats of other tools."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import jax.numpy as jnp
from etils import epath

from perfusion_jax.base_model import BaseModel
from perfusion_jax.formats.concept_file import PERFUSION, TrainedConcept
from perfusion_jax.formats.lora import bundle_bytes, embedding_bytes, lora_bytes, word_name
from perfusion_jax.formats.model_card import Card, Example, example_file
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.formats.pipeline_folder import pipeline_entries, write_pipeline
from perfusion_jax.formats.tensor_file import check_dtype
from perfusion_jax.formats.tree_folder import RECORD, TREE, write_tree
from perfusion_jax.method import surgery
from perfusion_jax.method.edit import Gate
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import check_writable, entries, read_text, to_path, write_bytes
from perfusion_jax.runtime.names import CONCEPT_EXPORTS, MODEL_EXPORTS

CARD = "README.md"
MARK = ".perfusion_jax_export"
"""The file that says of which export a folder is; it is written first, and nothing else may be there without it."""
FIT_TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a drawing of a {}",
    "a {} on a table",
    "a {} on the beach",
    "a {} in the snow",
    "a {} at night",
    "a {} and a tree",
    "a red {}",
)
"""What prompts are like, for `fitted_strengths`."""
Contents = tuple[list[str], Callable[[epath.Path], None]]
"""What an export's folder is to hold: names of files and folders, and what writes them into it."""


@dataclass(frozen=True)
class Export:
    """What is to be written, and how; see `export`."""

    base: BaseModel
    concepts: Sequence[TrainedConcept]
    strengths: Sequence[float]
    dtype: str
    gated: bool

    @property
    def stem(self) -> str:
        """How a file with all concepts is called."""
        return "_".join(card.name for _, card in self.concepts)

    def lora(self, peft: bool = False) -> Contents:
        """A LoRA and the words."""
        data = lora_bytes(self.base, self.concepts, self.strengths, peft, self.dtype)
        return _files({f"{self.stem}_lora.safetensors": data, **self._words()})

    def bundle(self) -> Contents:
        """Both in one file."""
        data = bundle_bytes(self.base, self.concepts, self.strengths, self.dtype)
        return _files({f"{self.stem}_bundle.safetensors": data})

    def words(self) -> Contents:
        """The words alone."""
        return _files(self._words())

    def pipeline(self) -> Contents:
        """A whole model."""
        return pipeline_entries(self.base), lambda folder: write_pipeline(
            folder, self.base, self.concepts, self.strengths, self.dtype
        )

    def orbax(self) -> Contents:
        """The UNet's parameter tree, and the words."""
        return [TREE, RECORD], lambda folder: write_tree(
            folder, self.base, self.concepts, self.strengths, not self.gated, self.dtype
        )

    def _words(self) -> dict[str, bytes]:
        return {
            f"{word_name(concept.card)}.safetensors": embedding_bytes(self.base.model, concept, self.dtype)
            for concept in self.concepts
        }


def _files(data: Mapping[str, bytes]) -> Contents:
    def write(folder: epath.Path) -> None:
        for name, content in data.items():
            write_bytes(folder / name, content)

    return list(data), write


_KINDS: dict[str, Callable[[Export], Contents]] = {
    "lora": Export.lora,
    "lora-peft": lambda export: export.lora(peft=True),
    "bundle": Export.bundle,
    "embedding": Export.words,
    "pipeline": Export.pipeline,
    "orbax": Export.orbax,
}
KINDS = (*CONCEPT_EXPORTS, *MODEL_EXPORTS)
"""The base model may be loaded with `edited_only` but for MODEL_EXPORTS."""


def fitted_strengths(base: BaseModel, concepts: Sequence[TrainedConcept]) -> list[float]:
    """The strengths at which the baked edit of concepts is nearest to the gated one, over prompts that name them.

    Args:
        base: the model that they were trained on.
        concepts: at least one.

    Raises:
        InputError: a name cannot stand in a prompt.
    """
    words = [card.placeholder for _, card in concepts]
    prompts = [template.format(word) for template in FIT_TEMPLATES for word in words]
    ids = base.model.tokenizer(prompts, words)
    embeddings = jnp.stack([concept.embedding for concept, _ in concepts])
    encodings = base.model.encode(base.params, ids, embeddings).tokens
    fitted = surgery.fitted_strengths(
        base.params["unet"],
        [concept for concept, _ in concepts],
        [Gate(card.bias, card.temperature) for _, card in concepts],
        encodings.reshape(-1, encodings.shape[-1]),
    )
    return [round(float(strength), 3) for strength in fitted]


def export(
    base: BaseModel,
    concepts: Sequence[TrainedConcept],
    kind: str,
    out: str | Path,
    strengths: Sequence[float] = (),
    dtype: str = "float16",
    gated: bool = False,
    draw_examples: Callable[[], Sequence[Example]] = tuple,
) -> list[epath.Path]:
    """Writes concepts as other tools read them, with a model card that says how.

    Args:
        base: the model that the concepts were trained on.
        concepts: at least one; several are baked together.
        kind: one of KINDS.
        out: a folder, local or in a bucket: a new one, an empty one, or one that holds an earlier export of the same
            kind, of concepts of the same names, which it replaces.
        strengths: of each concept; 1 if left out.
        dtype: `float32`, `bfloat16` or `float16`.
        gated: of `orbax`: whether the tree keeps the gated edit beside the frozen kernels; otherwise it is baked.
        draw_examples: gives pictures for the model card; called when it is clear that the rest can be written.

    Returns:
        What was written: files, and folders of them.

    Raises:
        InputError: one of these is impossible, or the folder holds something else.
        UnavailableError: storage fails.
    """
    if kind not in KINDS:
        raise InputError(f"{kind!r} is not a kind of export: {', '.join(KINDS)}")
    if not concepts:
        raise InputError("no concept to export: give at least one")
    names = [card.name for _, card in concepts]
    if len(set(names)) < len(names):
        raise InputError(f"two concepts are called {max(names, key=names.count)}: call one of them otherwise")
    for _, card in concepts:
        if card.method != PERFUSION:
            raise InputError(f"{card.name}: learnt by {card.method}, to compare with: only Perfusion's are exported")
        if not base.has_fingerprint(card.fingerprint):
            raise InputError(
                f"{card.name}: trained on the base model {card.base_model}, which {base.name} is not: give --base "
                f"{card.base_model}, or a copy of it"
            )
    strengths = list(strengths) or [1.0] * len(concepts)
    if len(strengths) != len(concepts):
        raise InputError(f"{len(strengths)} strengths for {len(concepts)} concepts: give one for each")
    if not all(map(isfinite, strengths)):
        raise InputError(f"strengths {strengths}: not finite")
    check_dtype(dtype)
    if gated and kind != "orbax":
        raise InputError(f"{kind} has no gate: leave it out, or export orbax")
    if gated and set(strengths) != {1.0}:
        raise InputError("the strength of a gated edit is told when it is drawn: leave it out")

    folder = to_path(out)
    names, write = _KINDS[kind](Export(base, concepts, strengths, dtype, gated))
    mark = json.dumps({"kind": kind, "concepts": [card.name for _, card in concepts]}).encode()
    _check_folder(folder, mark)
    check_writable(folder)
    write_bytes(folder / MARK, mark)
    write(folder)
    examples = draw_examples()
    pictures = [example_file(number) for number in range(len(examples))]
    for name, example in zip(pictures, examples, strict=True):
        write_picture(folder / name, example.pixels)
    # The card comes last: where it is, all else is.
    tensors = [name for name in names if name.endswith(".safetensors")]
    text = Card(base, [card for _, card in concepts], strengths, tensors, gated, examples).text(kind)
    write_bytes(folder / CARD, text.encode())
    return [folder / name for name in (*names, *pictures, CARD)]


def _check_folder(folder: epath.Path, mark: bytes) -> None:
    """Sees that nothing of somebody's is overwritten.

    Raises:
        InputError: the folder holds something else than this export.
    """
    others = [entry.name for entry in entries(folder) or () if entry.name != MARK]
    if not others:
        return
    found = read_text(folder / MARK).encode()
    if found != mark:
        whose = "an export of another kind, or of other concepts" if found else "no part of an export of this version"
        raise InputError(f"{folder}: holds {others[0]}, which is {whose}: name a new folder, or delete it")
