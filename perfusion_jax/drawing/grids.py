"""Pictures laid out side by side, with words beside them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 128  # pixels; smaller pictures are shown enlarged
LABEL_HEIGHT = 20  # pixels


def grid(
    rows: Sequence[np.ndarray], row_labels: Sequence[str] = (), column_labels: Sequence[str] = (), gap: int = 4
) -> np.ndarray:
    """Lays out rows of pictures of one size on white.

    Args:
        rows: uint8 [count, height, width, 3] each; shorter rows end in white.
        row_labels: words above each row, or none.
        column_labels: words above each column, or none.
        gap: pixels between pictures.

    Returns:
        uint8 [height, width, 3]. Small pictures are enlarged by a whole factor, without smoothing; words that are too
        long are cut.
    """
    height, width = rows[0].shape[1:3]
    factor = max(1, LEAST_SIDE // max(height, width))
    height, width = factor * height, factor * width
    columns = max(map(len, rows))
    top = LABEL_HEIGHT * bool(column_labels)
    above = LABEL_HEIGHT * bool(row_labels)
    full = (top + len(rows) * (above + height + gap) - gap, columns * (width + gap) - gap)
    sheet = np.full((*full, 3), 255, np.uint8)
    for number, row in enumerate(rows):
        for left, picture in enumerate(row):
            enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            y, x = top + number * (above + height + gap) + above, left * (width + gap)
            sheet[y : y + height, x : x + width] = enlarged
    if not row_labels and not column_labels:
        return sheet
    image = Image.fromarray(sheet)
    for number, label in enumerate(row_labels):
        _write(image, label, 0, top + number * (above + height + gap), full[1])
    for left, label in enumerate(column_labels):
        _write(image, label, left * (width + gap), 0, width)
    return np.asarray(image)


def _write(image: Image.Image, words: str, x: int, y: int, width: int) -> None:
    font = ImageFont.load_default(size=14)
    drawing = ImageDraw.Draw(image)
    shown = words
    while shown and drawing.textlength(shown, font) > width - 4:
        shown = shown[:-2] + "…" if len(shown) > 2 else ""
    drawing.text((x + 2, y + LABEL_HEIGHT / 2), shown, "black", font, anchor="lm")
