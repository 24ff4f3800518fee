"""PNG pictures that say how they were drawn."""

import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import storage_errors, to_path, write_bytes

KEY = "perfusion_jax"  # of the text chunk


def write_picture(file: str | os.PathLike[str], pixels: np.ndarray, recipe: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, local or in a bucket.

    Args:
        file: a .png.
        pixels: uint8 [height, width, 3].
        recipe: how it was drawn, as JSON; kept in the PNG's text.

    Raises:
        InputError, UnavailableError: it cannot be written.
    """
    text = PngImagePlugin.PngInfo()
    if recipe is not None:
        text.add_itxt(KEY, json.dumps(recipe, ensure_ascii=False))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png", pnginfo=text)
    write_bytes(file, stream.getvalue())


def load_recipe(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads how a picture was drawn.

    Raises:
        InputError: no such picture, or one that does not say.
        UnavailableError: storage fails.
    """
    path = to_path(file)
    with storage_errors(path, "read"):
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise InputError(f"{file}: no such picture") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            text = getattr(image, "text", {}).get(KEY)
    except UnidentifiedImageError as error:
        raise InputError(f"{file}: not a picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    try:
        recipe = json.loads(text or "")
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{file}: does not say how it was drawn: not a PNG that perfusion_jax.sample wrote") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{file}: what it says of how it was drawn cannot be read")
    return recipe
