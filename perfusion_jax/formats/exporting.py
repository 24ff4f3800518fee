"""Concepts in the formats of other tools."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from perfusion_jax.base_model import BaseModel
from perfusion_jax.formats.concept_file import ConceptCard, TrainedConcept
from perfusion_jax.formats.lora import DTYPES, bundle_bytes, embedding_bytes, lora_bytes, word_name
from perfusion_jax.formats.model_card import Card
from perfusion_jax.formats.pipeline_folder import write_pipeline
from perfusion_jax.formats.tree_folder import RECORD, TREE, write_tree
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import check_writable, entries, to_path, write_bytes

CARD = "README.md"


@dataclass(frozen=True)
class Export:
    """What is to be written, and how; see `export`."""

    base: BaseModel
    concepts: Sequence[TrainedConcept]
    strengths: Sequence[float]
    dtype: str
    gated: bool

    @property
    def cards(self) -> list[ConceptCard]:
        """What is known of the concepts."""
        return [card for _, card in self.concepts]

    @property
    def stem(self) -> str:
        """How a file with all concepts is called."""
        return "_".join(card.name for card in self.cards)

    def lora(self, peft: bool = False) -> dict[str, bytes]:
        """A LoRA and the words."""
        data = lora_bytes(self.base, self.concepts, self.strengths, peft, self.dtype)
        return {f"{self.stem}_lora.safetensors": data, **self.words()}

    def bundle(self) -> dict[str, bytes]:
        """Both in one file."""
        data = bundle_bytes(self.base, self.concepts, self.strengths, self.dtype)
        return {f"{self.stem}_bundle.safetensors": data}

    def words(self) -> dict[str, bytes]:
        """The words alone."""
        return {
            f"{word_name(concept.card)}.safetensors": embedding_bytes(self.base.model, concept, self.dtype)
            for concept in self.concepts
        }

    def pipeline(self) -> dict[str, bytes]:
        """A whole model; it is made on this machine, wherever it goes."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_pipeline(folder, self.base, self.concepts, self.strengths, self.dtype)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return {str(path.relative_to(folder)): path.read_bytes() for path in files}


_KINDS: dict[str, Callable[[Export], dict[str, bytes]]] = {
    "lora": Export.lora,
    "lora-peft": lambda export: export.lora(peft=True),
    "bundle": Export.bundle,
    "embedding": Export.words,
    "pipeline": Export.pipeline,
    "orbax": lambda export: {},  # Orbax itself writes what it has
}
KINDS = tuple(_KINDS)


def export(
    base: BaseModel,
    concepts: Sequence[TrainedConcept],
    kind: str,
    out: str | Path,
    strengths: Sequence[float] = (),
    dtype: str = "float16",
    gated: bool = False,
) -> list[epath.Path]:
    """Writes concepts as other tools read them, with a model card that says how.

    Args:
        base: the model that the concepts were trained on.
        concepts: at least one; several are baked together.
        kind: one of KINDS.
        out: a folder, local or in a bucket: a new one, an empty one, or one that holds an earlier export of the same
            names.
        strengths: of each concept; 1 if left out.
        dtype: `float32`, `bfloat16` or `float16`.
        gated: of `orbax`: whether the tree keeps the gated edit beside the frozen kernels; otherwise it is baked.

    Returns:
        What was written.

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
    strengths = list(strengths) or [1.0] * len(concepts)
    if len(strengths) != len(concepts):
        raise InputError(f"{len(strengths)} strengths for {len(concepts)} concepts: give one for each")
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if gated and kind != "orbax":
        raise InputError(f"{kind} has no gate: leave it out, or export orbax")
    if gated and set(strengths) != {1.0}:
        raise InputError("the strength of a gated edit is told when it is drawn: leave it out")

    folder, made = to_path(out), Export(base, concepts, strengths, dtype, gated)
    files = _KINDS[kind](made)
    by_orbax = [TREE, RECORD] if kind == "orbax" else []
    _check_folder(folder, {CARD, *by_orbax, *files})
    check_writable(folder)
    if by_orbax:
        write_tree(folder, base, concepts, strengths, not gated, dtype)
    # The card comes last: where it is, all else is.
    tensors = [name for name in files if "/" not in name and name.endswith(".safetensors")]
    card = Card(base, made.cards, strengths, tensors, gated).text(kind)
    for name, data in {**files, CARD: card.encode()}.items():
        write_bytes(folder / name, data)
    return [folder / name for name in (*by_orbax, *files, CARD)]


def _check_folder(folder: epath.Path, names: set[str]) -> None:
    ours = {name.split("/")[0] for name in names}
    others = [entry.name for entry in entries(folder) or () if entry.name not in ours]
    if others:
        raise InputError(f"{folder}: holds {others[0]}, which is no part of this export: name a new folder")
