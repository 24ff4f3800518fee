"""Pictures that a person drops on the page: checked by their content, shown as training will see them, and kept.

They lie in a draft's folder under names of the studio's own until the thing is learnt, and then in `pictures/NAME`
among the runs.
"""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from perfusion_jax.base_model import BaseModel
from perfusion_jax.data.pictures import fit, open_picture
from perfusion_jax.data.sources import read_pictures
from perfusion_jax.learning.preparation import concept_key, prepare_data
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import storage_errors
from perfusion_jax.runtime.names import STUDIO
from perfusion_jax.web.library import PICTURES

MOST_PICTURES = 64
MOST_BYTES = 64 * 2**20  # of a file
MOST_PIXELS = 64_000_000  # more than any phone's camera takes by default
MOST_PIXELS_TOGETHER = 512_000_000  # of a draft: all are decoded at once, to 3 bytes each, and 4 more where transparent
MOST_KEPT = 4 * 2**30  # bytes of all drafts
SHOWN_SIDE = 384  # pixels of a preview, on which masks are painted
DAY = 24 * 3600.0  # seconds, for which a draft that nobody learns is kept

_ENDINGS = {
    **{"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif"},
    **{"AVIF": ".avif", "HEIF": ".heic"},
}


@dataclass(frozen=True)
class Preview:
    """A picture as training will see it.

    Attributes:
        name: of the file that the person dropped.
        pixels: the square that is cut out of it, uint8 [SHOWN_SIDE, SHOWN_SIDE, 3].
        mask: how much the loss looks at each pixel, float32 [SHOWN_SIDE, SHOWN_SIDE] in [0, 1].
    """

    name: str
    pixels: np.ndarray
    mask: np.ndarray


def new_draft(runs: Path, files: Sequence[str | Path], names: Sequence[str]) -> Path:
    """Copies pictures into a draft's folder, as picture_01.jpg and so on.

    Args:
        runs: the studio's folder.
        files: as they were uploaded.
        names: what the person called them.

    Raises:
        InputError: there are none, or too many; or one is no picture, or is too large.
    """
    if not files:
        raise InputError("no pictures: drop 3 to 10 of them here")
    if len(files) > MOST_PICTURES:
        raise InputError(f"{len(files)} pictures: a concept is learnt from 3 to 10, and at most {MOST_PICTURES}")
    heads = [head_of(Path(file), name) for file, name in zip(files, names, strict=True)]
    pixels = sum(head.pixels for head in heads)
    if pixels > MOST_PIXELS_TOGETHER:
        raise InputError(
            f"{len(files)} pictures of {pixels // 10**6} million pixels together; at most "
            f"{MOST_PIXELS_TOGETHER // 10**6} million are taken: make them smaller, or leave some out"
        )
    endings = [head.ending for head in heads]
    drafts = runs / STUDIO / "drafts"
    with storage_errors(drafts, "written"):
        drafts.mkdir(parents=True, exist_ok=True)
        _make_room(drafts, sum(Path(file).stat().st_size for file in files))
        draft = Path(tempfile.mkdtemp(dir=drafts))
        for number, (file, ending) in enumerate(zip(files, endings, strict=True), start=1):
            shutil.copyfile(file, draft / f"picture_{number:02d}{ending}")
    return draft


def _make_room(drafts: Path, needed: int) -> None:
    """Deletes drafts that nobody has learnt for a day, and the oldest ones where they would be too much together.

    A page whose draft is gone sends its pictures again.
    """
    left = MOST_KEPT - needed
    for old in sorted(drafts.iterdir(), key=lambda draft: draft.stat().st_mtime, reverse=True):
        left -= sum(file.stat().st_size for file in old.rglob("*") if file.is_file())
        if left < 0 or time.time() - old.stat().st_mtime > DAY:
            shutil.rmtree(old, ignore_errors=True)


class Head(NamedTuple):
    """What the head of a picture's file says.

    Attributes:
        ending: that its name has to have.
        pixels: how many.
    """

    ending: str
    pixels: int


def head_of(file: Path, name: str) -> Head:
    """Reads the head of a file that was uploaded, by its content alone.

    Raises:
        InputError: it is no picture of a kind that is read here, or too large.
    """
    if file.stat().st_size > MOST_BYTES:
        raise InputError(f"{name}: {file.stat().st_size / 2**20:.0f} MiB; at most {MOST_BYTES >> 20} are taken")
    try:
        # No other decoder of PIL's sees what was uploaded. That of JPEG reads MPO.
        with Image.open(file, formats=[kind for kind in _ENDINGS if kind != "MPO"]) as image:
            kind, size = image.format or "", image.size
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: it has too many pixels; at most {MOST_PIXELS // 10**6} million are taken") from error
    except (OSError, ValueError, SyntaxError) as error:  # PIL's, of whatever is no picture
        kinds = ", ".join(sorted(set(_ENDINGS.values())))
        raise InputError(f"{name}: not a picture of a kind that is read here ({kinds})") from error
    if size[0] * size[1] > MOST_PIXELS:
        raise InputError(
            f"{name}: {size[0]} x {size[1]} pixels; at most {MOST_PIXELS // 10**6} million are taken: make it smaller"
        )
    return Head(_ENDINGS[kind], size[0] * size[1])


def preview(config: ConfigDict, base: BaseModel, draft: Path, names: Sequence[str]) -> list[Preview]:
    """Cuts a draft's pictures and finds their masks as training does.

    Args:
        config: the concept's, whose pictures are the draft's.
        base: the model.
        draft: the folder.
        names: what the person called the pictures, in the order of their files.

    Raises:
        InputError: a picture, its mask or the kind cannot be used.
    """
    pictures = read_pictures(str(draft))
    _, mask_key = jax.random.split(concept_key(config))
    data = prepare_data(config, base, pictures, mask_key)
    masks = np.asarray(data.examples.masks[:, 0])
    shown = []
    for picture, mask, name in zip(pictures, masks, names, strict=True):
        pixels = fit(picture, SHOWN_SIDE, config.crop).pixels
        grown = Image.fromarray(mask).resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BILINEAR)
        shown.append(Preview(name, pixels, np.clip(np.asarray(grown), 0, 1)))
    return shown


def folder_for(runs: Path, name: str) -> Path:
    """Where the pictures of a new concept go: no folder that is there already."""
    folder, number = runs / PICTURES / name, 2
    while folder.exists():
        folder, number = runs / PICTURES / f"{name}-{number}", number + 1
    return folder


def keep(draft: Path, folder: Path, masks: Mapping[str, np.ndarray], crop: bool) -> None:
    """Moves a draft's pictures to where their concept is learnt from.

    Args:
        draft: the folder.
        folder: the new one.
        masks: of the squares, by the stems of the pictures' files; written as masks of the whole pictures. Empty: they
            are found in training, as they were for the preview.
        crop: as config.crop.
    """
    with storage_errors(folder, "written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            if masks:
                (draft / "masks").mkdir(exist_ok=True)
                for file in sorted(draft.glob("picture_*")):
                    width, height = open_picture(epath.Path(file)).size
                    mask = on_whole(masks[file.stem], height, width, crop)
                    Image.fromarray((255 * mask).round().astype(np.uint8)).save(draft / "masks" / f"{file.stem}.png")
            draft.rename(folder)
        except Exception:  # the draft must not be looked at with some of the masks
            shutil.rmtree(draft / "masks", ignore_errors=True)
            raise
        folder.chmod(0o755)  # a draft is its owner's alone


def take_back(folder: Path, draft: Path) -> None:
    """Makes kept pictures a draft again, if their concept cannot be learnt after all."""
    with storage_errors(folder, "written"):
        shutil.rmtree(folder / "masks", ignore_errors=True)
        folder.rename(draft)


def on_whole(mask: np.ndarray, height: int, width: int, crop: bool) -> np.ndarray:
    """A mask of the square that `data.pictures.fit` makes, put back on the picture that it was made of.

    Args:
        mask: float32 [side, side].
        height, width: of the picture.
        crop: as for `fit`.

    Returns:
        float32 [height, width]; where the square does not reach, which is cut away again, its edge goes on.
    """
    side = min(height, width) if crop else max(height, width)
    square = np.asarray(Image.fromarray(mask).resize((side, side), Image.Resampling.BILINEAR))
    top, left = (round(abs(length - side) / 2) for length in (height, width))
    if not crop:
        return square[top : top + height, left : left + width]
    around = ((top, height - side - top), (left, width - side - left))
    return np.pad(square, around, mode="edge")
