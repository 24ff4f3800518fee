"""How pictures go into a model of transformers, by its preprocessor_config.json."""

from pathlib import Path
from typing import Any, NamedTuple

from perfusion_jax.base_model.source import read_config
from perfusion_jax.runtime.errors import InputError

# Pillow's numbers of filters (PIL.Image.Resampling), and what jax.image.resize calls the same ones.
_FILTERS = {0: "nearest", 1: "lanczos3", 2: "linear", 3: "cubic"}


class Preprocessor(NamedTuple):
    """How pictures go into a model of transformers.

    Attributes:
        mean, deviation: by which the channels of pictures in [0, 1] are normalised, three numbers each.
        side: to which pictures are resized, in pixels, or None if the file does not say.
        crop: side of what is then cut out of the middle, or None for all of it.
        method: of `jax.image.resize`.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    side: int | None
    crop: int | None
    method: str


def read_preprocessor(folder: Path) -> Preprocessor:
    """Reads a model's preprocessor_config.json.

    Raises:
        InputError: it is missing, not JSON, lacks the normalisation, or has a filter that jax has not.
    """
    file = folder / "preprocessor_config.json"
    config = read_config(file)
    missing = [key for key in ("image_mean", "image_std") if len(config.get(key) or ()) != 3]
    if missing:
        raise InputError(f"{file}: {missing[0]} is missing, or not three numbers")

    def side(size: Any) -> int | None:
        return size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size

    # What the processors that cut do where nothing is said; those that do not cut write no crop_size.
    crop = side(config.get("crop_size")) if config.get("do_center_crop", True) else None
    resample = config.get("resample", 3)
    if resample not in _FILTERS:
        raise InputError(f"{file}: resample is {resample!r}; it must be one of {', '.join(map(str, _FILTERS))}")
    mean, deviation = tuple(config["image_mean"]), tuple(config["image_std"])
    return Preprocessor(mean, deviation, side(config.get("size")), crop, _FILTERS[resample])
