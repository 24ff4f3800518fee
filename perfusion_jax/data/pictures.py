"""Reads a concept's folder: pictures, and, where they are given, masks and captions.

    FOLDER/rex.jpg              a picture: jpg, png or webp, of any size
    FOLDER/masks/rex.png        optional: white where the thing is, of the picture's size
    FOLDER/rex.txt              optional: a caption, with {} where the concept's name goes

A folder may be local or in a bucket (`gs://...`).
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import entries, storage_errors

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST = 16  # pixels; there is nothing to learn from less


@dataclass(frozen=True)
class Picture:
    """A picture as it is in its file, upright.

    Attributes:
        name: the file's, for messages.
        pixels: uint8 [height, width, 3]; what is transparent is white.
        mask: how much of each pixel is the thing, float32 [height, width] in [0, 1]: from a mask file, else from the
            picture's transparency, else None.
        caption: with one `{}`, or None.
        inside: how much of each pixel is the picture and not what `fit` put around it, float32 [height, width], or None
            if all of it is.
    """

    name: str
    pixels: np.ndarray
    mask: np.ndarray | None
    caption: str | None
    inside: np.ndarray | None = None


def read_folder(
    folder: str | os.PathLike[str],
    masks: str | os.PathLike[str] | None = None,
    captions: str | os.PathLike[str] | None = None,
) -> list[Picture]:
    """Reads all pictures of a folder, in the order of their names.

    Args:
        folder: of the pictures.
        masks: folder of the masks; left out, they are those in FOLDER/masks, if it exists.
        captions: folder of the captions; left out, they are beside the pictures.

    Raises:
        InputError: no such folder, no picture in it, or a file that cannot be used; the message names it.
        UnavailableError: storage fails.
    """
    root = epath.Path(folder)
    inside = entries(root)
    if inside is None:
        raise InputError(f"{root}: no such folder of pictures")
    with storage_errors(root, "read"):
        files = [file for file in inside if file.suffix.lower() in ENDINGS and not file.is_dir()]
    if not files:
        raise InputError(f"{root}: no pictures in it ({', '.join(ENDINGS)})")
    stems = [file.stem for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise InputError(
            f"{root}: two pictures are called {twice[0]!r}: masks and captions go by that name; rename one"
        )
    mask_root = epath.Path(masks) if masks is not None else root / "masks"
    mask_entries = entries(mask_root)
    if masks is not None and mask_entries is None:
        raise InputError(f"{masks}: no such folder")
    caption_root = epath.Path(captions) if captions is not None else root
    if captions is not None and entries(caption_root) is None:
        raise InputError(f"{captions}: no such folder")
    mask_files = {} if mask_entries is None else _mask_files(mask_root, mask_entries, stems)
    return [_read(file, mask_files.get(file.stem), caption_root / f"{file.stem}.txt") for file in files]


def _mask_files(folder: epath.Path, inside: Sequence[epath.Path], stems: Sequence[str]) -> dict[str, epath.Path]:
    files = {file.stem: file for file in inside if file.suffix.lower() in ENDINGS}
    unmatched = sorted(files.keys() - set(stems))
    if unmatched:
        raise InputError(f"{files[unmatched[0]]}: a mask of no picture: its name must be a picture's")
    missing = sorted(set(stems) - files.keys())
    if missing:
        raise InputError(f"{folder}: no mask for the picture {missing[0]!r}: give one for each picture, or none")
    return files


def _read(file: epath.Path, mask_file: epath.Path | None, caption_file: epath.Path) -> Picture:
    image = open_picture(file)
    if min(image.size) < SMALLEST:
        raise InputError(f"{file}: {image.width} x {image.height} pixels; at least {SMALLEST} x {SMALLEST} are needed")
    transparent = image.has_transparency_data
    mask = None
    if transparent:
        image = image.convert("RGBA")
        mask = np.asarray(image.getchannel("A"), np.float32) / 255
        # Transparency that hides nothing says nothing of where the thing is.
        mask = None if mask.min() == 1 else mask
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("RGB"))
    if mask_file is not None:
        mask_image = open_picture(mask_file).convert("L")
        if mask_image.size != image.size:
            sizes = [f"{one.width} x {one.height}" for one in (mask_image, image)]
            raise InputError(f"{mask_file}: {sizes[0]} pixels; its picture has {sizes[1]}")
        mask = np.asarray(mask_image, np.float32) / 255
    if mask is not None and mask.max() == 0:
        raise InputError(f"{mask_file or file}: all of it is masked out: nothing is left to learn from")
    return Picture(file.name, pixels, mask, _caption(caption_file))


def open_picture(file: epath.Path) -> Image.Image:
    """Reads a picture, turned upright as its EXIF data says, with 8 bits a channel.

    Raises:
        InputError: it cannot be read.
        UnavailableError: storage fails.
    """
    with storage_errors(file, "read"):
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise InputError(f"{file}: no such picture") from error
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode.startswith("I"):  # PIL cuts 16-bit greys off at 255 instead of scaling them
            image = Image.fromarray((np.asarray(image, np.float32) / 257).round().astype(np.uint8))
        image.load()
    except UnidentifiedImageError as error:
        raise InputError(f"{file}: not a picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    return image


def _caption(file: epath.Path) -> str | None:
    with storage_errors(file, "read"):
        try:
            caption = file.read_text().strip()
        except FileNotFoundError:
            return None
    if caption.count("{}") != 1:
        raise InputError(f"{file}: the caption {caption!r} needs exactly one {{}}, where the concept's name goes")
    return caption


def fit(picture: Picture, side: int, crop: bool) -> Picture:
    """Scales a picture, never unevenly, to a square of `side` pixels.

    Args:
        picture: as read.
        side: in pixels.
        crop: cut the longer side to its middle; otherwise the whole picture is kept and white fills the square.

    Raises:
        InputError: the crop cuts away all of the mask.
    """
    method = Image.Resampling.LANCZOS

    def square(array: np.ndarray, fill: str | int) -> np.ndarray:
        image = Image.fromarray(array)
        fitted = ImageOps.fit(image, (side, side), method) if crop else ImageOps.pad(image, (side, side), method, fill)
        return np.asarray(fitted)

    def square_mask(mask: np.ndarray) -> np.ndarray:
        return np.clip(square(mask, 0), 0, 1)  # Lanczos overshoots a little

    height, width = picture.pixels.shape[:2]
    mask = None if picture.mask is None else square_mask(picture.mask)
    if mask is not None and mask.max() == 0:
        raise InputError(f"{picture.name}: cropping to a square cuts the thing away: set config.crop=False")
    padded = not crop and height != width
    inside = square_mask(np.ones((height, width), np.float32)) if padded else None
    return replace(picture, pixels=square(picture.pixels, "white"), mask=mask, inside=inside)
