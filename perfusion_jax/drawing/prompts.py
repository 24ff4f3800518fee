"""Prompts written for other programs: what those read in them and this one does not."""

import re
from collections.abc import Sequence

# AUTOMATIC1111's web UI and those that came after it.
_EXTRA_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
_WEIGHT = re.compile(r"(?<!\\)\(((?:[^()\\]|\\.)*?):\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*\)")
_BRACKETS = re.compile(r"(?<!\\)\[([^\[\]]*)\]")
_MORE = re.compile(r"(?<!\\)\(((?:[^()\\]|\\.)*)\)")
_KEYWORD = re.compile(r"(?<!\S)(?:BREAK|AND)(?!\S)")
_ESCAPED = re.compile(r"\\([()\[\]])")


def escaped(prompt: str) -> str:
    """A prompt of which `without_syntax` gives that prompt."""
    return re.sub(r"[()\[\]]", r"\\\g<0>", prompt)


def without_syntax(prompt: str) -> tuple[str, list[str]]:
    """Takes out of a prompt what is not plain words: weights, brackets, keywords, and files that are to be loaded.

    Returns:
        (the prompt without them, what was taken out, in the order of kinds and places).
    """
    found: list[str] = []

    def keep_words(match: re.Match[str]) -> str:
        found.append(match[0])
        # Of `[from:to:0.5]` and `[one|other]` all words are kept.
        return re.sub(r"[:|]", " ", re.sub(r":\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*$", "", match[1]))

    def unwrap(match: re.Match[str]) -> str:
        found.append(match[0])
        return match[1]

    def drop(match: re.Match[str]) -> str:
        found.append(match[0])
        return " "

    plain = _EXTRA_NETWORK.sub(drop, prompt)
    before = ""
    while plain != before:  # they may be nested
        before = plain
        plain = _BRACKETS.sub(keep_words, _WEIGHT.sub(keep_words, plain))
        if plain == before:  # what is left has no number
            plain = _MORE.sub(unwrap, plain)
    plain = _KEYWORD.sub(drop, plain)
    if found:
        plain = " ".join(plain.split())
    return _ESCAPED.sub(r"\1", plain), found


def foreign(prompts: Sequence[str]) -> list[str]:
    """Warnings of prompts that have something which other programs read and this one does not."""
    read = [without_syntax(prompt) for prompt in prompts]
    return [
        f"{', '.join(found)}: weights, brackets, keywords and LoRAs of other programs do nothing here; drawing "
        f"{plain!r}"
        for plain, found in read
        if found
    ]
