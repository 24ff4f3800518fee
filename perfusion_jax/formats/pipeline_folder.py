"""A whole model in the diffusers layout, with concepts' words in its tokeniser and text encoders and their edit baked
into its kernels: it is drawn with no code of ours.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from perfusion_jax.base_model import BaseModel
from perfusion_jax.base_model.architecture import read_tokenizer
from perfusion_jax.base_model.text import PromptTokenizer
from perfusion_jax.base_model.weights import torch_tensors
from perfusion_jax.formats.concept_file import TrainedConcept
from perfusion_jax.formats.tensor_file import check_fit
from perfusion_jax.method.surgery import Params
from perfusion_jax.runtime.files import write_bytes, writing

_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
# Keys of configs that name classes.
_CLASSES = ("_class_name", "architectures")


def pipeline_entries(base: BaseModel) -> list[str]:
    """What `write_pipeline` writes into its folder: names of files and of folders."""
    tokenizers = {encoder.tokenizer for encoder in base.model.text_encoders}
    return sorted({*base.model.shapes, *tokenizers, "scheduler", "model_index.json"})


def write_pipeline(
    folder: epath.Path,
    base: BaseModel,
    concepts: Sequence[TrainedConcept],
    strengths: Sequence[float] = (),
    dtype: str = "float16",
) -> None:
    """Writes a model that `StableDiffusionPipeline.from_pretrained`, or that of XL, draws, and `load_base_model` too.

    Prompts call the concepts by `<name>`, as ours do.

    Args:
        folder: local or in a bucket.
        base: the model that the concepts were trained on.
        concepts: at least one.
        strengths: of each; 1 if left out.
        dtype: of the weights, one of `tensor_file.DTYPES`.

    Raises:
        InputError: a concept's word is one of the model's already, a number does not fit into the dtype, or the folder
            cannot be written.
        UnavailableError: storage fails.
    """
    words = [card.placeholder for _, card in concepts]
    params = dict(base.baked([concept for concept, _ in concepts], strengths or [1.0] * len(concepts)).params)
    start = 0
    for encoder in base.model.text_encoders:
        grown = read_tokenizer(base.layout, encoder).with_words(words)
        _write_tokenizer(folder / encoder.tokenizer, grown)
        rows = [concept.embedding[start : start + encoder.width] for concept, _ in concepts]
        start += encoder.width
        ids = [grown.id_of(word) for word in words]
        params[encoder.component] = _with_words(params[encoder.component], ids, jnp.stack(rows), grown.vocabulary_size)
        # Older models say 2, by which transformers means the largest id: now that would be a concept's.
        special = {"eos_token_id": grown.end, "pad_token_id": grown.padding}
        config = base.layout.config(encoder.component) | special | {"vocab_size": grown.vocabulary_size}
        _write_config(folder / encoder.component, _of_torch(config))
    for component in ("unet", "vae"):
        _write_config(folder / component, _of_torch(base.layout.config(component)))
    _write_config(folder / "scheduler", base.layout.config("scheduler"), "scheduler_config.json")
    for component in base.model.shapes:
        stem = _STEMS.get(component, "model")
        tensors = torch_tensors(params[component], jnp.dtype(dtype))
        check_fit(tensors)
        with writing(folder / component / f"{stem}.safetensors") as file:
            save_file(tensors, file, {"format": "pt"})
    _write_config(folder, _index(base), "model_index.json")


def _with_words(text_params: Params, ids: Sequence[int], embeddings: jnp.ndarray, size: int) -> Params:
    """A text encoder whose table of word embeddings has `size` rows, at `ids` those given."""
    model = text_params["text_model"]
    table = model["embeddings"]["token_embedding"]["embedding"]
    longer = jnp.concatenate([table, jnp.zeros((size - len(table), table.shape[1]), table.dtype)])
    longer = longer.at[np.array(ids)].set(embeddings.astype(table.dtype))
    embeddings_tree = {**model["embeddings"], "token_embedding": {"embedding": longer}}
    return {**text_params, "text_model": {**model, "embeddings": embeddings_tree}}


def _of_torch(config: dict[str, Any]) -> dict[str, Any]:
    """A config, or an index of configs, whose classes are those of PyTorch."""

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(each) for each in value]
        return value.removeprefix("Flax") if isinstance(value, str) else value

    return {key: name(value) if key in _CLASSES or isinstance(value, list) else value for key, value in config.items()}


def _index(base: BaseModel) -> dict[str, Any]:
    """The model_index.json of what is written: the parts that a model draws with, and no safety checker."""
    parts = pipeline_entries(base)
    index = _of_torch(base.layout.index())
    kept = {key: value for key, value in index.items() if key in parts or not isinstance(value, list)}
    if len(base.model.text_encoders) > 1:
        return kept
    absent: dict[str, Any] = {"safety_checker": [None, None], "feature_extractor": [None, None]}
    return {**kept, **absent, "requires_safety_checker": False}


def _write_config(folder: epath.Path, config: dict[str, Any], name: str = "config.json") -> None:
    write_bytes(folder / name, (json.dumps(config, indent=2) + "\n").encode())


def _write_tokenizer(folder: epath.Path, tokenizer: PromptTokenizer) -> None:
    # transformers writes to local folders alone.
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save(Path(temporary))
        for file in sorted(Path(temporary).iterdir()):
            write_bytes(folder / file.name, file.read_bytes())
