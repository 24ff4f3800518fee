"""What the page sends: JSON, each value checked before it is used."""

import ast
import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from perfusion_jax.config import KEYS, check, make_config
from perfusion_jax.learning.judges import NONE
from perfusion_jax.runtime.errors import InputError

# Keys that the page asks for by itself, that are the studio's to give, or that name files: no path of the page's is
# opened.
_NOT_BY_HAND = (
    *("name", "super_category", "pictures", "concepts", "base", "revision", "variant", "members", "mesh"),
    *("covariance", "captions", "segmenter", "steps", "seed", "masks", "crop", "flip", "licence"),
)
_ENCODERS = ("evaluator", "instance_encoder")  # of which one may do without


class Form:
    """An object of JSON, read value by value.

    Args:
        values: as the page sent it.

    Raises:
        InputError: it is no object. So do all methods where a value is of another kind, and name it.
    """

    def __init__(self, values: Any):
        if not isinstance(values, dict):
            raise InputError("what was sent is no object of JSON")
        self._values = values

    def text(self, name: str, longest: int = 2000) -> str:
        """A text without blanks around it; empty if it was left out."""
        value = self._values.get(name) or ""
        if not isinstance(value, str) or len(value) > longest or not _is_unicode(value):
            raise InputError(f"{name}: it must be text of at most {longest} letters")
        return value.strip()

    def flag(self, name: str, default: bool) -> bool:
        """A switch."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{name}: it must be true or false")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number within bounds; None if it was left out."""
        value = self._values.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{name}: it must be a number")
        try:
            value = float(value)
        except OverflowError:  # of a whole number
            value = inf
        if not isfinite(value):
            raise InputError(f"{name}: it must be a number")
        if not least <= value <= most:
            raise InputError(f"{name} is {value:.15g}; it must be from {least:.15g} to {most:.15g}")
        return value

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A whole number within bounds; None if it was left out."""
        value = self.number(name, least, most)
        if value is not None and value != int(value):
            raise InputError(f"{name} is {value:.15g}; it must be a whole number")
        return None if value is None else int(value)

    def one_of(self, name: str, choices: Sequence[str]) -> str:
        """One of some words; the first if it was left out."""
        value = self._values.get(name) or choices[0]
        if value not in choices:
            raise InputError(f"{name}: it must be one of {', '.join(map(repr, choices))}")
        return value

    def part(self, name: str) -> "Form":
        """An object within it; empty if it was left out."""
        return Form(self._values.get(name) or {})

    def parts(self, name: str) -> dict[str, Any]:
        """An object within it as it is; empty if it was left out."""
        value = self._values.get(name) or {}
        if not isinstance(value, dict):
            raise InputError(f"{name}: it must be an object")
        return value

    def picture(self, name: str, side: int, mode: str) -> np.ndarray | None:
        """A PNG that the page has painted, `side` pixels wide and high, as uint8 pixels of PIL's `mode`."""
        value = self._values.get(name)
        if value is None:
            return None
        try:
            data = base64.b64decode(str(value).removeprefix("data:image/png;base64,"), validate=True)
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if image.size != (side, side):
                    raise InputError(f"{name}: it must have {side} x {side} pixels")
                return np.asarray(image.convert(mode))
        except (binascii.Error, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{name}: not a PNG") from error


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON may have halves of letters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_keys(text: str) -> dict[str, Any]:
    """Reads keys of the config, one `KEY=VALUE` a line.

    Raises:
        InputError: a line is of another form, or names no key that can be given so.
    """
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, sign, value = map(str.strip, line.partition("="))
        if not sign or key not in KEYS or key in _NOT_BY_HAND:
            raise InputError(
                f"{line!r}: write KEY=VALUE, with a key of docs/training.md that the page does not ask for"
            )
        try:
            found[key] = ast.literal_eval(value)
        except (MemoryError, RecursionError, SyntaxError, ValueError):  # of what is nested too deeply, the first two
            found[key] = value  # a word
        if key in _ENCODERS and found[key] != NONE:
            raise InputError(f"{line!r}: on the page it can only be {NONE!r}")
        if KEYS[key].rule.kind is float and type(found[key]) is int:
            try:
                found[key] = float(found[key])
            except OverflowError as error:
                raise InputError(f"{key}: the number is too large") from error
    return found


def thing_config(source: Mapping[str, str | None], form: Form, name: str, pictures: str) -> ConfigDict:
    """The config of a thing that is to be learnt.

    Args:
        source: of the studio's base model, keyword arguments of `load_base_model`.
        form: `kind`, and what is not the default.
        name: of the concept.
        pictures: their folder.

    Raises:
        InputError: a value is impossible.
    """
    kind = form.text("kind", 100)
    if not kind:
        raise InputError("say what kind of thing it is, in a word such as dog")
    own: dict[str, Any] = {
        "steps": form.whole("steps", 1, 1_000_000),
        "seed": form.whole("seed", 0, 2**31),
        # Left out, it is what is usual for the method.
        "masks": mask if (mask := form.one_of("masks", ("auto", "attention", "none"))) != "auto" else None,
        "crop": form.flag("crop", True),
        "flip": form.flag("flip", True),
        "licence": form.text("licence"),
    }
    given = {key: value for key, value in own.items() if value is not None} | parse_keys(form.text("keys"))
    more = {key: source[key] for key in ("revision", "variant") if source[key]}
    config = make_config(source["source"] or "", name=name, super_category=kind, pictures=pictures, **{**more, **given})
    check(config)
    return config
