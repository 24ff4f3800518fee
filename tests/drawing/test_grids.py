"""Sheets of pictures."""

import numpy as np

from perfusion_jax.drawing.grids import LABEL_HEIGHT, grid


def test_rows_of_pictures_with_gaps_on_white():
    red, blue = (np.full((64, 32, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    sheet = grid([np.stack([red, blue]), np.stack([blue])], gap=2)
    assert sheet.shape == (2 * 128 + 2, 2 * 64 + 2, 3)  # shown twice as large
    assert (sheet[:128, :64] == red[0, 0]).all()
    assert (sheet[:128, 66:] == blue[0, 0]).all()
    assert (sheet[130:, :64] == blue[0, 0]).all()
    assert (sheet[130:, 66:] == 255).all()
    assert (sheet[128:130] == 255).all()


def test_words_stand_above_rows_and_columns_and_are_cut():
    picture = np.full((1, 128, 128, 3), 200, np.uint8)
    rows = [np.concatenate([picture, picture])] * 2
    sheet = grid(rows, ["first", "second"], ["left", "a column with a name that does not fit into it"])
    assert sheet.shape == (LABEL_HEIGHT + 2 * (LABEL_HEIGHT + 128) + 4, 260, 3)
    words = (sheet < 100).any(axis=2)
    assert words[:LABEL_HEIGHT, :128].any()
    assert words[:LABEL_HEIGHT, 132:].any()
    assert not words[:LABEL_HEIGHT, 128:132].any()
    second = 2 * LABEL_HEIGHT + 128 + 4
    assert words[LABEL_HEIGHT : 2 * LABEL_HEIGHT].any()
    assert words[second : second + LABEL_HEIGHT].any()
    assert (sheet[2 * LABEL_HEIGHT : second - 4, :128] == 200).all()
