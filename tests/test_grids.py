import numpy as np

from perfusion_jax.grids import LEAST_SIDE, grid


def test_small_pictures_are_enlarged_and_rows_may_differ():
    picture = np.zeros((64, 64, 3), np.uint8)
    sheet = grid([np.stack([picture, picture]), picture[None]], gap=4)
    assert sheet.shape == (2 * LEAST_SIDE + 4, 2 * LEAST_SIDE + 4, 3)
    assert (sheet[:LEAST_SIDE, :LEAST_SIDE] == 0).all()
    assert (sheet[LEAST_SIDE + 4 :, LEAST_SIDE + 4 :] == 255).all()


def test_large_pictures_keep_their_size():
    assert grid([np.zeros((1, 512, 256, 3), np.uint8)]).shape == (512, 256, 3)
