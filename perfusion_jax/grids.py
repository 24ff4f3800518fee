"""Pictures laid out side by side."""

from collections.abc import Sequence

import numpy as np

LEAST_SIDE = 128  # pixels; smaller pictures are shown enlarged


def grid(rows: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Lays out rows of pictures of one size on white.

    Args:
        rows: uint8 [count, height, width, 3] each; shorter rows end in white.
        gap: pixels between pictures.

    Returns:
        uint8 [height, width, 3]. Small pictures are enlarged by a whole factor, without smoothing.
    """
    height, width = rows[0].shape[1:3]
    factor = max(1, LEAST_SIDE // max(height, width))
    height, width = factor * height, factor * width
    columns = max(map(len, rows))
    sheet = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            y, x = top * (height + gap), left * (width + gap)
            sheet[y : y + height, x : x + width] = enlarged
    return sheet
