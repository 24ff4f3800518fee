"""Train the tokenizer: byte-pair encoding over the world's vocabulary, in CLIPTokenizer's layout.

Every word of the vocabulary becomes a single token; any other text falls apart into smaller pieces, as in CLIP.
"""

import collections
import hashlib
import itertools
import json
import pathlib
from collections.abc import Sequence

from transformers.models.clip.tokenization_clip import CLIPTokenizer, bytes_to_unicode

from pretraining import captions

START, END = "<|startoftext|>", "<|endoftext|>"
MODEL_MAX_LENGTH = 32
"""Positions of the text encoder: the longest captions of the world are cut."""

END_OF_WORD = "</w>"


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each of `words` one symbol, most frequent pair first, ties in alphabetical order.

    Args:
        words: lower-case ASCII words.

    Returns:
        List of (left, right) in the order in which they apply.
    """
    spellings = {word: (*word[:-1], word[-1] + END_OF_WORD) for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = collections.Counter(pair for symbols in spellings.values() for pair in itertools.pairwise(symbols))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = {word: _merge(symbols, best) for word, symbols in spellings.items()}


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def split_words(words: Sequence[str]) -> list[str]:
    """Words as CLIP's tokenizer separates them before byte pairs apply: "close-up" is "close", "-", "up"."""
    return sorted({part for word in words for part in word.replace("-", " - ").split()})


def save_tokenizer(folder: pathlib.Path | str) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the configuration files of a CLIPTokenizer into `folder`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(split_words(captions.vocabulary()))
    byte_symbols = list(bytes_to_unicode().values())
    symbols = [
        *byte_symbols,
        *(symbol + END_OF_WORD for symbol in byte_symbols),
        *("".join(pair) for pair in merges),
    ]
    vocabulary = {symbol: number for number, symbol in enumerate(dict.fromkeys(symbols))}
    vocabulary[START] = len(vocabulary)
    # Last of all: CLIPTextModel finds the end of a text by its id, and older versions by the largest id.
    vocabulary[END] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    # CLIPTokenizer skips the first line (a version comment) and the empty last one.
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        folder / "vocab.json", folder / "merges.txt", pad_token=END, model_max_length=MODEL_MAX_LENGTH
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def load_tokenizer(folder: pathlib.Path | str) -> CLIPTokenizer:
    """The CLIPTokenizer saved in `folder`."""
    return CLIPTokenizer.from_pretrained(folder)


def digest(tokenizer: CLIPTokenizer) -> str:
    """Names a vocabulary: every token with its id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:12]


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of `texts`: list of lists of MODEL_MAX_LENGTH ints, padded with the end token."""
    return tokenizer(texts, padding="max_length", max_length=MODEL_MAX_LENGTH, truncation=True).input_ids
