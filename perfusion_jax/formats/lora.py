"""A baked edit as a LoRA file, and a concept's word as an embedding file: what other tools read.

Both styles of a LoRA hold the same products W' = W + up down. `kohya` is read by diffusers, A1111, Forge, SD.Next,
ComfyUI, kohya and OneTrainer; `peft` by diffusers alone (others pass it over without an error).
"""

import json
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import Architecture, BaseModel
from perfusion_jax.base_model.weights import torch_name
from perfusion_jax.formats.concept_file import ConceptCard, TrainedConcept
from perfusion_jax.formats.tensor_file import converted, tensor_bytes
from perfusion_jax.method.edit import Factors
from perfusion_jax.method.surgery import baked_changes

WORD = "emb_params"
"""What an embedding file of a single text encoder calls the embedding."""
CLIP_NAMES = ("clip_l", "clip_g")
"""What tools call the text encoders of SDXL, in their order; the first of these also that of Stable Diffusion 1."""

# What tools call the base models that they know, by the width of text encodings and the number of text encoders: kohya,
# and Stability's model specification by what the model predicts.
_KNOWN = {
    (768, 1): ("sd_v1", {"epsilon": "stable-diffusion-v1"}),
    (1024, 1): ("sd_v2", {"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"}),
    (2048, 2): ("sdxl_base_v1-0", {"epsilon": "stable-diffusion-xl-v1-base"}),
}


def lora_bytes(
    base: BaseModel,
    concepts: Sequence[TrainedConcept],
    strengths: Sequence[float] = (),
    peft: bool = False,
    dtype: str = "float16",
) -> bytes:
    """The content of a LoRA file: the ungated edit of concepts, several of them in one span (`edit.baked_change`).

    The gate is lost. The file applies s(e), the similarity itself, where the gated edit applies
    sigmoid((s - beta) / tau); and it acts on empty and negative prompts, too.

    Args:
        base: the model that the concepts were trained on.
        concepts: at least one.
        strengths: of each; 1 if left out.
        peft: whether names are those of PEFT instead of kohya's.
        dtype: one of `tensor_file.DTYPES`.

    Raises:
        InputError: a number does not fit into the dtype.
    """
    tensors = _change_tensors(base, concepts, strengths, peft)
    return tensor_bytes(converted(tensors, dtype), {"format": "pt"} if peft else _metadata(base.model, concepts))


def bundle_bytes(
    base: BaseModel, concepts: Sequence[TrainedConcept], strengths: Sequence[float] = (), dtype: str = "float16"
) -> bytes:
    """The content of one file with LoRA and words, which A1111 and SD.Next read, and diffusers refuses.

    Args:
        base, concepts, strengths, dtype: as for `lora_bytes`.

    Raises:
        InputError: as for `lora_bytes`.
    """
    tensors = _change_tensors(base, concepts, strengths, peft=False)
    for concept in concepts:
        for encoder, embedding in zip(CLIP_NAMES, _embeddings(base.model, concept), strict=False):
            tensors[f"bundle_emb.{word_name(concept.card)}.{encoder}"] = embedding
    return tensor_bytes(converted(tensors, dtype), _metadata(base.model, concepts))


def embedding_bytes(model: Architecture, concept: TrainedConcept, dtype: str = "float16") -> bytes:
    """The content of a textual-inversion file: a concept's word embedding, [1, width] for each text encoder.

    Args:
        model: that the concept was trained on.
        concept: the concept.
        dtype: one of `tensor_file.DTYPES`.

    Raises:
        InputError: a number does not fit into the dtype.
    """
    parts = _embeddings(model, concept)
    names = (WORD,) if len(parts) == 1 else CLIP_NAMES
    metadata = _specification(model, [concept.card], "textual-inversion")
    return tensor_bytes(converted(dict(zip(names, parts, strict=True)), dtype), metadata)


def word_name(card: ConceptCard) -> str:
    """What tools that call an embedding by its file's name write for a concept: no word that a prompt may hold."""
    return f"{card.name}_word"


def balanced(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """The matrices of a LoRA: down float32 [rank, context_width], and up float32 [out_width, rank].

    In each rank-one term both vectors have the same length, so that half precision neither overflows nor flushes to
    zero.
    """
    down, up = np.asarray(factors.down), np.asarray(factors.up)
    of_down, of_up = np.linalg.norm(down, axis=1), np.linalg.norm(up, axis=1)
    there = (of_down > 0) & (of_up > 0)  # at strength 0 there is nothing to balance
    ratio = np.sqrt(np.divide(of_up, of_down, out=np.ones_like(of_up), where=there))[:, None]
    return down * ratio, (up / ratio).T


def _change_tensors(
    base: BaseModel, concepts: Sequence[TrainedConcept], strengths: Sequence[float], peft: bool
) -> dict[str, np.ndarray]:
    strength = jnp.asarray(strengths or [1.0] * len(concepts), jnp.float32)
    changes = baked_changes(base.params["unet"], [concept for concept, _ in concepts], strength)
    tensors: dict[str, np.ndarray] = {}
    for path, factors in changes.items():
        module = torch_name(tuple(path.split("/"))).removesuffix(".weight")
        down, up = balanced(factors)
        if peft:
            tensors |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
        else:
            name = f"lora_unet_{module.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = np.array(len(concepts), np.float32)  # alpha / rank scales the product
    return tensors


def _embeddings(model: Architecture, concept: TrainedConcept) -> list[np.ndarray]:
    """A concept's word embedding for each text encoder, float32 [1, width]."""
    widths = [encoder.width for encoder in model.text_encoders]
    return np.split(np.asarray(concept.concept.embedding)[None], np.cumsum(widths)[:-1], axis=1)


def _metadata(model: Architecture, concepts: Sequence[TrainedConcept]) -> dict[str, str]:
    """What tools show of a LoRA, all of it strings: kohya's keys, and those of Stability's specification."""
    cards = [card for _, card in concepts]
    version, _ = _KNOWN.get(_widths(model), ("", {}))
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(len(cards)),
        "ss_network_alpha": str(float(len(cards))),
        "ss_network_args": "{}",
        "ss_output_name": "_".join(card.name for card in cards),
        "ss_tag_frequency": json.dumps({card.name: {word_name(card): 1} for card in cards}),
        "ss_training_comment": "Perfusion (arXiv 2305.01644), baked by perfusion_jax; goes with the words beside it",
    }
    if version:
        metadata["ss_base_model_version"] = version
    if version == "sd_v2":
        metadata["ss_v2"] = "True"
    return metadata | _specification(model, cards, "lora")


def _specification(model: Architecture, cards: Sequence[ConceptCard], kind: str) -> dict[str, str]:
    """Metadata by Stability's model specification 1.0.0."""
    _, architectures = _KNOWN.get(_widths(model), ("", {}))
    architecture = architectures.get(model.schedule.prediction_type)
    licences = sorted({card.licence for card in cards} - {""})
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": " and ".join(card.name for card in cards),
        "modelspec.trigger_phrase": ", ".join(word_name(card) for card in cards),
        "modelspec.description": "; ".join(
            f"{card.name} ({card.super_category}), learnt on {card.base_model} in {card.step} steps" for card in cards
        ),
        **({"modelspec.architecture": f"{architecture}/{kind}"} if architecture else {}),
        **({"modelspec.license": ", ".join(licences)} if licences else {}),
    }


def _widths(model: Architecture) -> tuple[int, int]:
    return model.context_width, len(model.text_encoders)
