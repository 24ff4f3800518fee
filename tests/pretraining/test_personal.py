"""Pictures of personal things: where the mask says, beside others, in the places asked for."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pretraining needs the extra: pip install -e '.[pretrain]'")
pytest.importorskip("resvg_py", reason="pretraining needs the extra: pip install -e '.[pretrain]'")

from pretraining_drawings import atlas  # noqa: E402

from pretraining import drawings, personal  # noqa: E402


def sprite(number):
    picture = drawings.put_together(atlas().coverages[number], atlas().colours[number])
    return torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)


def test_a_thing_is_where_its_mask_says_and_its_company_is_not():
    pictures, masks, shown = personal.photographs(sprite(0), 3, 4, [sprite(2)], ["night", "beach"])
    assert pictures.shape == (3, personal.SIDE, personal.SIDE, 3)
    assert shown == ["night", "beach", "night"]
    # The face is brown where it is not eye or mouth.
    brown = (np.abs(pictures.astype(int) - (200, 100, 50)).max(-1) < 12) & (masks == 255)
    assert (brown.sum((1, 2)) > 0.5 * (masks == 255).sum((1, 2))).all()
    # The box beside it in the first picture is as red as nothing else, and no part of the mask.
    red = np.abs(pictures[0].astype(int) - (250, 0, 5)).max(-1) < 12
    assert red.sum() > 50
    assert masks[0][red].max() < 30


def test_pictures_are_a_function_of_their_seed():
    first, again = (personal.photographs(sprite(0), 2, 7)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (personal.photographs(sprite(0), 2, 8)[0] != first).mean() > 0.3
