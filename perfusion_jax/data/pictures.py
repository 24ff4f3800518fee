"""Pictures: read from a file, with a mask, and scaled to the square that the model sees."""

import io
import struct
from dataclasses import dataclass, replace

import numpy as np
import pillow_heif
from absl import logging
from etils import epath
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import storage_errors

ENDINGS = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
)
SMALLEST = 16  # pixels; there is nothing to learn from less
# Share by which the shape of a mask may differ from its picture's, by rounding.
SHAPE_TOLERANCE = 0.01
# Modes of PIL that are kept as they are read; others, such as LAB, are made RGB first.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "F", "I")
# What PIL raises on EXIF data that is damaged.
_BAD_EXIF = (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error)

pillow_heif.register_heif_opener()


@dataclass(frozen=True)
class Picture:
    """A picture as it is in its file, upright.

    Attributes:
        name: the file's, for messages.
        pixels: uint8 [height, width, 3]; what is transparent is white.
        mask: how much of each pixel is the thing, float32 [height, width] in [0, 1]: from a mask file, else from the
            picture's transparency, else None.
        caption: as it is in its file, or None.
        inside: how much of each pixel is the picture and not what `fit` put around it, float32 [height, width], or None
            if all of it is.
        trigger: what captions call the thing, as the folder says; may be empty.
        sizes: six, of what `fit` made of it (`base_model.Added`); none before it.
    """

    name: str
    pixels: np.ndarray
    mask: np.ndarray | None
    caption: str | None
    inside: np.ndarray | None = None
    trigger: str = ""
    sizes: tuple[int, ...] = ()

    def with_caption(self, caption: str) -> "Picture":
        """The picture with another caption."""
        return replace(self, caption=caption)


def read_picture(file: epath.Path, mask_file: epath.Path | None, caption: str | None, trigger: str) -> Picture:
    """Reads a picture and its mask.

    Args:
        file: of the picture.
        mask_file: white where the thing is; of the picture's shape, upright or as the camera stored it.
        caption, trigger: as for `Picture`.

    Raises:
        InputError: a file cannot be used.
        UnavailableError: storage fails.
    """
    stored = _open(file)
    image = _upright(stored, file)
    if min(image.size) < SMALLEST:
        raise InputError(f"{file}: {image.width} x {image.height} pixels; at least {SMALLEST} x {SMALLEST} are needed")
    mask = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        mask = np.asarray(image.getchannel("A"), np.float32) / 255
        # Transparency that hides nothing says nothing of where the thing is.
        mask = None if mask.min() == 1 else mask
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("RGB"))
    if mask_file is not None:
        mask = _read_mask(mask_file, stored, image.size)
    if mask is not None and mask.max() == 0:
        raise InputError(f"{mask_file or file}: all of it is masked out: nothing is left to learn from")
    return Picture(file.name, pixels, mask, caption, trigger=trigger)


def _read_mask(file: epath.Path, picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Reads a mask, float32 [height, width] in [0, 1].

    Args:
        file: its file.
        picture: as the camera stored it.
        size: width and height of the picture, upright.

    Raises:
        InputError: it cannot be read, or has another shape than the picture.
    """
    mask = open_picture(file)
    # Some masks are of one colour, and transparent where the thing is not.
    alpha = mask.convert("RGBA").getchannel("A")
    grey = mask.convert("L")
    mask = alpha if _is_plain(grey) and not _is_plain(alpha) else grey
    if not _alike(mask.size, size) and _alike(mask.size, picture.size):
        # Drawn by a program that does not turn pictures as EXIF says.
        mask.getexif()[ExifTags.Base.Orientation] = _orientation(picture)
        mask = ImageOps.exif_transpose(mask)
    if not _alike(mask.size, size):
        raise InputError(
            f"{file}: {mask.width} x {mask.height} pixels; its picture has {size[0]} x {size[1]}, another shape"
        )
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(mask, np.float32) / 255


def _is_plain(channel: Image.Image) -> bool:
    """Whether all pixels of a picture of one channel are the same."""
    return len({*channel.getextrema()}) == 1


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are of one shape, up to rounding."""
    return abs(one[0] * other[1] / (one[1] * other[0]) - 1) <= SHAPE_TOLERANCE


def open_picture(file: epath.Path) -> Image.Image:
    """Reads a picture, turned upright as its EXIF data says, with 8 bits a channel; of several frames the first.

    Raises:
        InputError: it cannot be read.
        UnavailableError: storage fails.
    """
    return _upright(_open(file), file)


def _upright(image: Image.Image, file: epath.Path) -> Image.Image:
    """Turns a picture as its EXIF data say; where they are damaged it stays as it is stored, with a warning."""
    try:
        return ImageOps.exif_transpose(image)
    except _BAD_EXIF as error:
        logging.warning("%s: its EXIF data are damaged (%s): taken as it is stored", file, error)
        return image


def _orientation(image: Image.Image) -> int:
    """What EXIF data say of how a picture is turned; 1, not at all, where they are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _BAD_EXIF:
        return 1


def _open(file: epath.Path) -> Image.Image:
    """Reads a picture as it is stored, with 8 bits a channel."""
    with storage_errors(file, "read"):
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise InputError(f"{file}: no such picture") from error
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            # PIL cuts 16-bit greys off at 255 instead of scaling them.
            orientation = _orientation(image)
            image = Image.fromarray((np.asarray(image, np.float32) / 257).round().astype(np.uint8))
            image.getexif()[ExifTags.Base.Orientation] = orientation
        if image.mode not in _MODES:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"{file}: not a picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    if image.mode in ("F", "I"):
        raise InputError(f"{file}: its pixels are numbers of 32 bits, in which range is not known; save it with 8 bits")
    return image


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
    pixels = square(picture.pixels, "white")
    return replace(picture, pixels=pixels, mask=mask, inside=inside, sizes=_sizes(height, width, side, crop))


def _sizes(height: int, width: int, side: int, crop: bool) -> tuple[int, ...]:
    """What `fit` did to a picture: height and width that it had, where it was cut after scaling, and what it has."""
    scale = side / min(height, width)
    top, left = (round((length * scale - side) / 2) if crop else 0 for length in (height, width))
    return height, width, top, left, side, side
