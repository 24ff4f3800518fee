"""The text encoders of a checkpoint in PyTorch transformers, as diffusers' pipelines read them."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class TorchEncoding(NamedTuple):
    """What they make of prompts, and what the UNet adds of it: keyword arguments of its call."""

    tokens: torch.Tensor
    added: dict[str, dict[str, torch.Tensor]]


def encode(
    folder: Path, ids: np.ndarray, sizes: np.ndarray | None = None, embeddings: torch.Tensor | None = None
) -> TorchEncoding:
    """Encodes ids, int32 [batch, tokens]; those beyond the vocabulary take rows of `embeddings`.

    `sizes`, [batch, 6], and the vector for a whole prompt are for models with two encoders alone.
    """
    plain = torch.from_numpy(np.array(ids)).long()
    if not (folder / "text_encoder_2").is_dir():
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        return TorchEncoding(_run(encoder, plain, embeddings).last_hidden_state, {})
    first = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").eval()
    of_first, of_second = None, None
    if embeddings is not None:
        of_first, of_second = embeddings.split([first.config.hidden_size, second.config.hidden_size], dim=1)
    tokenizer, other = (CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
    padded = plain.clone()
    for row in padded:
        end = row.tolist().index(tokenizer.eos_token_id)
        row[end + 1 :] = other.pad_token_id
    one, two = _run(first, plain, of_first), _run(second, padded, of_second)
    tokens = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    pooled = two.text_embeds
    time_ids = torch.zeros(len(plain), 6) if sizes is None else torch.from_numpy(np.array(sizes))
    return TorchEncoding(tokens, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}})


def _run(encoder, ids, embeddings):
    placed = ids >= encoder.config.vocab_size
    if embeddings is not None:
        which = torch.where(placed, ids - encoder.config.vocab_size, 0)

        def put(module, args, rows):
            return torch.where(placed[..., None], embeddings[which], rows)

        encoder.text_model.embeddings.token_embedding.register_forward_hook(put)
    return encoder(torch.where(placed, 0, ids), output_hidden_states=True)


def pipeline_class(folder: Path) -> str:
    """The name of diffusers' class for the checkpoint."""
    return json.loads((folder / "model_index.json").read_text())["_class_name"]
