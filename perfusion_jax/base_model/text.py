"""Prompts to encodings, with placeholder tokens whose word embedding comes from a concept.

A placeholder `<name>` stands for concept j of a list and has the token id `vocabulary_size + j`: neither the
tokeniser's vocabulary nor the embedding table grows.
"""

import copy
import difflib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model.flax_classes import (
    CLIPTextConfig,
    CLIPTokenizer,
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPTextModule,
)
from perfusion_jax.method.surgery import Params
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.names import NAME_RULE, PLACEHOLDER

_END_OF_WORD = "</w>"
_ONE_FILE = "tokenizer.json"


class PromptTokenizer:
    """A checkpoint's tokeniser, which also knows placeholders.

    Attributes:
        vocabulary_size: rows of the text encoder's embedding table.
        length: number of tokens in every encoded prompt, with start, end and padding.
    """

    def __init__(self, tokenizer: CLIPTokenizer, vocabulary_size: int, length: int):
        self._tokenizer = tokenizer
        self.vocabulary_size = vocabulary_size
        self.length = length

    @property
    def end(self) -> int:
        """The token id that ends a prompt."""
        return self._tokenizer.eos_token_id

    @property
    def padding(self) -> int:
        """The token id behind the end."""
        return self._tokenizer.pad_token_id

    def has_words_of(self, other: "PromptTokenizer") -> bool:
        """Whether another tokeniser has the same words.

        That the second one of SDXL calls `!` its padding, transformers takes for a reason to read it otherwise in
        prompts, too; the tokeniser that the model was trained with (OpenCLIP's) does not.
        """
        ours, theirs = self._tokenizer, other._tokenizer
        return (ours.get_vocab(), ours.bpe_ranks, self.end) == (theirs.get_vocab(), theirs.bpe_ranks, other.end)

    def __call__(self, prompts: Sequence[str], placeholders: Sequence[str] = ()) -> np.ndarray:
        """Tokenises prompts.

        Args:
            prompts: they may name concepts by their placeholders.
            placeholders: `<name>` of each concept, in the order of the embeddings given to `encode`.

        Returns:
            int32 [len(prompts), length]: start, the words, end, padding.

        Raises:
            InputError: a prompt is too long, or names a concept that is not in `placeholders`, or a placeholder is
                malformed or a word of the vocabulary.
        """
        if isinstance(prompts, str):
            raise InputError(f"prompts is one string, {prompts!r}: give a list of them")
        self._check_placeholders(placeholders)
        rows = [self._frame(self._words(prompt, placeholders), prompt) for prompt in prompts]
        return np.asarray(rows, np.int32).reshape(len(rows), self.length)

    def captions(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenises captions found in the wild: long ones are cut, and nothing in them is a placeholder.

        Returns:
            ids, int32 [len(captions), length], and a mask of the same shape, bool: true from the start token to the end
            token, both included, false at the padding.
        """
        words = [self._plain(caption)[: self.length - 2] for caption in captions]
        rows = [self._frame(row, caption) for row, caption in zip(words, captions, strict=True)]
        lengths = np.array([len(row) + 2 for row in words])
        ids = np.asarray(rows, np.int32).reshape(len(rows), self.length)
        return ids, np.arange(self.length) < lengths[:, None]

    def with_words(self, words: Sequence[str]) -> "PromptTokenizer":
        """Returns a tokeniser whose vocabulary has some words more, each a token of its own, behind all others.

        Raises:
            InputError: it has one of them already.
        """
        self._check_placeholders(words)
        grown = copy.deepcopy(self._tokenizer)
        grown.add_tokens(list(words))
        grown.model_max_length = self.length  # to which diffusers pads prompts; some vocabularies say nothing of it
        return PromptTokenizer(grown, max(self.vocabulary_size, len(grown)), self.length)

    def id_of(self, word: str) -> int:
        """Returns the token id of a word of the vocabulary."""
        return self._tokenizer.convert_tokens_to_ids(word)

    def save(self, folder: Path) -> None:
        """Writes the tokeniser as transformers reads it."""
        self._tokenizer.save_pretrained(folder)

    def words(self, phrase: str) -> list[int]:
        """Returns the token ids of a super-category, without start, end and padding.

        Raises:
            InputError: it has none.
        """
        ids = self._plain(phrase)
        if not ids:
            raise InputError(
                f"the super-category {phrase!r} is empty: give the word for this kind of thing, such as 'dog'"
            )
        return ids

    def in_pieces(self, phrase: str) -> dict[str, list[str]]:
        """Finds words of a super-category that the vocabulary does not have whole.

        The model has hardly seen such a word, or it is misspelt: what its last piece is locked to may be anything.

        Returns:
            {word: those that look most like it of the vocabulary's own words, at most three}.
        """
        found = [word for word in phrase.split() if not all(map(self._is_whole, self._plain(word)))]
        if not found:
            return {}
        known = [word for word in self.whole_words if word.isascii()]
        return {word: difflib.get_close_matches(word.lower(), known) for word in found}

    @property
    def whole_words(self) -> list[str]:
        """The words that the vocabulary has whole, of two letters at least, in its order."""
        tokens = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = [token.removesuffix(_END_OF_WORD) for token, _ in tokens if token.endswith(_END_OF_WORD)]
        return [word for word in words if len(word) > 1 and word.isalpha()]

    def _is_whole(self, token: int) -> bool:
        return self._tokenizer.convert_ids_to_tokens(token).endswith(_END_OF_WORD)

    def locate(self, template: str, phrase: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokenises a template such as `a photo of a {}` with a phrase at its slot, and says where the phrase is.

        Returns:
            ids, int32 [length], and a mask, bool [length], true at the phrase's tokens.

        Raises:
            InputError: the phrase has no token, the template no slot, or the prompt is too long.
        """
        if template.count("{}") != 1:
            raise InputError(f"the template {template!r} needs exactly one {{}}, where the word goes")
        before, after = (self._plain(part) for part in template.split("{}"))
        words = self.words(phrase)
        ids = self._frame([*before, *words, *after], template.replace("{}", phrase))
        mask = np.zeros(self.length, bool)
        first = 1 + len(before)  # after the start token
        mask[first : first + len(words)] = True
        return np.asarray(ids, np.int32), mask

    def shorten(self, template: str, phrase: str) -> str:
        """Leaves words out at the end of a template such as `a photo of a {}`, until the text encoder takes it.

        Args:
            template: with one slot.
            phrase: the longest that is put there.
        """
        while template and len(self._plain(template.replace("{}", phrase))) > self.length - 2:
            template = template.rpartition(" ")[0]
        return template

    def pieces(self, prompt: str, placeholders: Sequence[str] = ()) -> list[tuple[int, str]]:
        """Returns the tokens of a prompt as people read them, each with its position in the encoded prompt.

        Raises:
            InputError: as for a call.
        """
        ids = self._words(prompt, placeholders)
        known = self._tokenizer.convert_ids_to_tokens([min(i, self.vocabulary_size - 1) for i in ids])
        concept = [i - self.vocabulary_size for i in ids]
        words = [
            placeholders[j] if j >= 0 else word.removesuffix("</w>") for j, word in zip(concept, known, strict=True)
        ]
        return list(enumerate(words, start=1))  # after the start token

    def _check_placeholders(self, placeholders: Sequence[str]) -> None:
        for placeholder in placeholders:
            if not PLACEHOLDER.fullmatch(placeholder):
                raise InputError(f"{placeholder!r} is not a placeholder, <name>: a name must be {NAME_RULE}")
            known = self._tokenizer.get_vocab()
            if placeholder in known or f"{placeholder}</w>" in known:
                raise InputError(
                    f"{placeholder} is already a word of the base model's vocabulary: name the concept otherwise"
                )
        if len(set(placeholders)) < len(placeholders):
            raise InputError(f"two concepts share a placeholder: {', '.join(placeholders)}; rename one")

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _words(self, prompt: str, placeholders: Sequence[str]) -> list[int]:
        for token in (self._tokenizer.bos_token, self._tokenizer.eos_token):
            if token in prompt:
                raise InputError(f"the prompt {prompt!r} has {token}, which is a mark of the tokeniser and no word")
        ids: list[int] = []
        start = 0
        for match in PLACEHOLDER.finditer(prompt):
            if match[0] not in placeholders and match[0] in self._tokenizer.get_vocab():
                continue  # a word of the model's own: an export put it there
            if match[0] not in placeholders:
                names = ", ".join(placeholders) or "none"
                raise InputError(f"the prompt {prompt!r} names {match[0]}, but the concepts given are: {names}")
            ids += [*self._plain(prompt[start : match.start()]), self.vocabulary_size + placeholders.index(match[0])]
            start = match.end()
        return ids + self._plain(prompt[start:])

    def _frame(self, words: list[int], prompt: str) -> list[int]:
        if len(words) + 2 > self.length:
            raise InputError(
                f"the prompt {prompt!r} has {len(words)} tokens; this text encoder takes {self.length - 2}: shorten it"
            )
        padding = [self.padding] * (self.length - len(words) - 2)
        return [self._tokenizer.bos_token_id, *words, self.end, *padding]


def load_tokenizer(folder: Path, config: CLIPTextConfig, padding: str | None = None) -> PromptTokenizer:
    """Reads a checkpoint's tokeniser.

    Args:
        folder: with vocab.json and merges.txt, or with tokenizer.json.
        config: of the text encoder.
        padding: the token behind the end of a prompt, or None for the one that the folder says.

    Raises:
        InputError: it is not complete, not of CLIP's kind, or has more words than the text encoder.
    """
    is_one_file = tokenizer_files(folder) == [folder / _ONE_FILE]
    try:
        tokenizer = _of_one_file(folder) if is_one_file else CLIPTokenizer.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{folder}: not a CLIP tokeniser ({error!r})") from error
    if padding is not None:
        tokenizer.pad_token = padding  # not earlier: then it would no longer be an ordinary word of prompts
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{folder}: {len(tokenizer)} words, but the text encoder knows {config.vocab_size}")
    return PromptTokenizer(tokenizer, config.vocab_size, config.max_position_embeddings)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that hold a tokeniser's words: two, or the one that transformers 5 writes.

    Raises:
        InputError: one is missing.
    """
    files = [folder / "vocab.json", folder / "merges.txt"]
    missing = [file for file in files if not file.is_file()]
    if missing and (folder / _ONE_FILE).is_file():
        return [folder / _ONE_FILE]
    if missing:
        raise InputError(f"{missing[0]}: missing; the folder is not complete")
    return files


def _of_one_file(folder: Path) -> CLIPTokenizer:
    """The tokeniser of a folder that has all its words in tokenizer.json."""
    content = json.loads((folder / _ONE_FILE).read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    model, added = content["model"], sorted(content["added_tokens"], key=lambda token: token["id"])
    marks = {token["content"]: token["id"] for token in added if token["special"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token") if name in config}
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary) / "vocab.json", Path(temporary) / "merges.txt"]
        files[0].write_text(json.dumps({**model["vocab"], **marks}), encoding="utf-8")
        files[1].write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        tokenizer = CLIPTokenizer(*map(str, files), **special)
    tokenizer.add_tokens([token["content"] for token in added if token["content"] not in tokenizer.get_vocab()])
    return tokenizer


@dataclass(frozen=True)
class TextEncoder:
    """One of the text encoders of a model, without its weights.

    Attributes:
        component: what its weights are called, such as `text_encoder_2`.
        module: the architecture; with a projection, it also gives one vector for a whole prompt.
        penultimate: whether cross-attention reads the last layer but one, without the final layer norm, as it does of
            several encoders (SDXL, arXiv 2307.01952); otherwise it reads the last one after that norm.
        end: the token id that ends a prompt.
        padding: the token id behind the end, or None for what the model's tokeniser puts there.
    """

    component: str
    module: FlaxCLIPTextModule | FlaxCLIPTextModelWithProjectionModule
    penultimate: bool = False
    end: int = 0
    padding: int | None = None

    @property
    def tokenizer(self) -> str:
        """What the tokeniser beside it is called, such as `tokenizer_2`."""
        return self.component.replace("text_encoder", "tokenizer")

    @property
    def width(self) -> int:
        """Of its word embeddings and of its encodings."""
        return self.module.config.hidden_size

    @property
    def pooled_width(self) -> int | None:
        """Width of the vector for a whole prompt; None if it gives none."""
        projects = isinstance(self.module, FlaxCLIPTextModelWithProjectionModule)
        return self.module.config.projection_dim if projects else None

    def init_params(self, key: jax.Array) -> Params:
        """Returns random weights."""
        ids = jnp.zeros((1, self.module.config.max_position_embeddings), jnp.int32)
        return self.module.init(key, ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None])["params"]


class Encoding(NamedTuple):
    """What a model's text encoders make of prompts; of several encoders side by side.

    Attributes:
        tokens: what cross-attention reads, [batch, tokens, context_width].
        pooled: one vector for each prompt, [batch, pooled_width], where an encoder with a projection gives one.
    """

    tokens: jax.Array
    pooled: jax.Array | None


def encode(
    encoders: Sequence[TextEncoder],
    params: Mapping[str, Params],
    ids: jax.Array,
    concept_embeddings: jax.Array | None = None,
) -> Encoding:
    """Encodes tokenised prompts; differentiable in the concepts' word embeddings.

    Args:
        encoders: the text encoders of a model.
        params: their weights by component.
        ids: int32 [batch, tokens]. The id `vocabulary_size + j` takes row j of `concept_embeddings`.
        concept_embeddings: float32 [num_concepts, token_width], for each concept its word embeddings for all encoders,
            one after the other; may be left out when no prompt names a concept.

    Raises:
        InputError: an id has no embedding. (Under a transformation, where ids have no values, the encodings are NaN.)
    """
    tokens, pooled, start = [], None, 0
    for encoder in encoders:
        embeddings = concept_embeddings
        if embeddings is not None:
            embeddings = embeddings[:, start : start + encoder.width]
        start += encoder.width
        output = _run(encoder, params[encoder.component], ids, embeddings)
        tokens.append(output.hidden_states[-2] if encoder.penultimate else output.last_hidden_state)
        pooled = getattr(output, "text_embeds", pooled)
    return Encoding(jnp.concatenate(tokens, axis=-1), pooled)


def _run(encoder: TextEncoder, text_params: Params, ids: jax.Array, concept_embeddings: jax.Array | None) -> Any:
    """Runs one encoder; returns the output of its Flax module."""
    vocabulary_size = encoder.module.config.vocab_size
    count = 0 if concept_embeddings is None else concept_embeddings.shape[0]
    if not isinstance(ids, jax.core.Tracer) and ids.size:
        largest = np.asarray(ids).max()
        if largest >= vocabulary_size + count:
            raise InputError(
                f"a prompt names {largest - vocabulary_size + 1} concepts, but {count} embeddings are given"
            )
    if encoder.padding is not None:
        ends = jnp.argmax(ids == encoder.end, axis=-1, keepdims=True)  # the first: padding may look the same
        ids = jnp.where(jnp.arange(ids.shape[-1]) > ends, encoder.padding, ids)
    is_concept = ids >= vocabulary_size

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.module.name != "token_embedding" or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        rows = next_fun(*args, **kwargs)
        if concept_embeddings is None:
            return jnp.where(is_concept[..., None], jnp.nan, rows)
        which = jnp.where(is_concept, ids - vocabulary_size, 0)
        concept_rows = concept_embeddings.at[which].get(mode="fill", fill_value=jnp.nan)
        return jnp.where(is_concept[..., None], concept_rows.astype(rows.dtype), rows)

    with nn.intercept_methods(intercept):
        return encoder.module.apply(
            {"params": text_params},
            # The vector for a whole prompt is read where the id is largest: a concept's must not be that.
            jnp.where(is_concept, 0, ids),
            jnp.ones_like(ids),
            jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape),
            output_hidden_states=encoder.penultimate,
        )


def mean_at(encodings: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean encoding over the masked tokens of all prompts, float32 [context_width].

    Args:
        encodings: [batch, tokens, context_width].
        mask: bool [batch, tokens], such as `ids == vocabulary_size + j` for concept j's token; true somewhere.
    """
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("bt,btd->d", weights, encodings.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return total / weights.sum()
