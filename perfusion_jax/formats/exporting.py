"""Concepts in the formats of other tools."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from perfusion_jax.base_model import BaseModel
from perfusion_jax.formats.concept_file import TrainedConcept
from perfusion_jax.formats.lora import bundle_bytes, embedding_bytes, lora_bytes, word_name
from perfusion_jax.formats.model_card import Card
from perfusion_jax.formats.pipeline_folder import write_pipeline
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import check_writable, entries, to_path, write_bytes

KINDS = ("lora", "lora-peft", "bundle", "embedding", "pipeline")
CARD = "README.md"


def export(
    base: BaseModel,
    concepts: Sequence[TrainedConcept],
    kind: str,
    out: str | Path,
    strengths: Sequence[float] = (),
    dtype: str = "float16",
) -> list[epath.Path]:
    """Writes concepts as other tools read them, with a model card that says how.

    Args:
        base: the model that the concepts were trained on.
        concepts: at least one; several are baked together.
        kind: one of KINDS.
        out: a folder, local or in a bucket: a new one, an empty one, or one that holds an earlier export of the same
            name.
        strengths: of each concept; 1 if left out.
        dtype: `float32`, `bfloat16` or `float16`.

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
    cards = [card for _, card in concepts]
    names = [card.name for card in cards]
    if len(set(names)) < len(names):
        raise InputError(f"two concepts are called {max(names, key=names.count)}: call one of them otherwise")
    strengths = list(strengths) or [1.0] * len(concepts)
    if len(strengths) != len(concepts):
        raise InputError(f"{len(strengths)} strengths for {len(concepts)} concepts: give one for each")
    folder = to_path(out)
    words = {f"{word_name(card)}.safetensors": concept for concept, card in zip(concepts, cards, strict=True)}
    stem = "_".join(names)
    weights = {"lora": f"{stem}_lora.safetensors", "bundle": f"{stem}_bundle.safetensors"}.get(
        kind.partition("-")[0], ""
    )
    with tempfile.TemporaryDirectory() as temporary:
        files: dict[str, bytes | Path] = {}
        if kind == "bundle":
            files[weights] = bundle_bytes(base, concepts, strengths, dtype)
        elif weights:
            files[weights] = lora_bytes(base, concepts, strengths, kind == "lora-peft", dtype)
        if kind in ("bundle", "pipeline"):
            words = {}
        files |= {name: embedding_bytes(base.model, concept, dtype) for name, concept in words.items()}
        if kind == "pipeline":
            write_pipeline(Path(temporary), base, concepts, strengths, dtype)
            whole = sorted(path for path in Path(temporary).rglob("*") if path.is_file())
            files |= {str(path.relative_to(temporary)): path for path in whole}
        _check_folder(folder, {CARD, *files})
        check_writable(folder)
        # The card comes last: where it is, all else is.
        files[CARD] = Card(base, cards, strengths, weights, list(words)).text(kind).encode()
        for name, content in files.items():
            write_bytes(folder / name, content if isinstance(content, bytes) else content.read_bytes())
    return [folder / name for name in files]


def _check_folder(folder: epath.Path, names: set[str]) -> None:
    ours = {name.split("/")[0] for name in names}
    others = [entry.name for entry in entries(folder) or () if entry.name not in ours]
    if others:
        raise InputError(f"{folder}: holds {others[0]}, which is no part of this export: name a new folder")
