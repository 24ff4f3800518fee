"""Drawings taken apart: the parts give back what the vector renderer draws, in any colours."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="pretraining needs the extra: pip install -e '.[pretrain]'")
pytest.importorskip("resvg_py", reason="pretraining needs the extra: pip install -e '.[pretrain]'")

from pretraining_drawings import BOX, FACE, HAT

from pretraining import drawings, things, vendors


def rendered(svg):
    """What the renderer draws, centred as the parts are: float [PIXELS, PIXELS, 4], premultiplied."""
    picture = drawings.rasterise(svg, drawings.RASTER_PIXELS)
    premultiplied = np.concatenate([picture[..., :3] * picture[..., 3:], picture[..., 3:]], -1)
    return drawings.centre(premultiplied.transpose(2, 0, 1)).transpose(1, 2, 0) / 255


@pytest.mark.parametrize("svg", [FACE, BOX, HAT])
def test_parts_add_up_to_the_drawing(svg):
    coverages, colours = drawings.take_apart(svg)
    assert np.abs(drawings.put_together(coverages, colours) - rendered(svg)).max() < 0.03


def test_new_colours_give_what_the_renderer_draws_with_them():
    coverages, colours = drawings.take_apart(FACE)
    new = {
        (200, 100, 50): (20, 200, 90),
        (255, 255, 255): (250, 230, 10),
        (0, 0, 0): (0, 0, 120),
        (200, 0, 0): (9, 9, 9),
    }
    painted = drawings.put_together(
        coverages, np.array([new.get(tuple(colour), (0, 0, 0)) for colour in colours.tolist()])
    )
    svg = drawings.recolour(FACE, {old: f"rgb{colour}" for old, colour in new.items()})
    assert np.abs(painted - rendered(svg)).max() < 0.03
    assert np.abs(painted - rendered(FACE)).max() > 0.5


def test_a_drawing_of_many_colours_is_reduced_to_its_main_ones():
    stripes = "".join(
        f'<path d="M0 {4 * row}h100v4H0z" fill="rgb({10 * row},{255 - 10 * row},128)"/>' for row in range(25)
    )
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{stripes}</svg>'
    coverages, colours = drawings.take_apart(svg)
    assert len(colours) == drawings.PARTS
    error = np.square(drawings.put_together(coverages, colours) - rendered(svg)).mean()
    assert error < 0.002


def test_a_drawing_is_centred_and_fills_its_square():
    coverages, _ = drawings.take_apart(BOX)
    visible = coverages.sum(0, dtype=int) > 40
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    assert (columns[0], columns[-1]) == (0, drawings.PIXELS - 1)
    assert rows[0] == pytest.approx(drawings.PIXELS / 4, abs=1)
    assert rows[-1] == pytest.approx(3 * drawings.PIXELS / 4 - 1, abs=1)


def test_a_drawing_that_shows_nothing_is_refused():
    with pytest.raises(ValueError, match="shows nothing"):
        drawings.take_apart('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"></svg>')


def test_held_out_vendors_are_no_part_of_the_world():
    assert not set(vendors.WORLD) & set(vendors.HELD_OUT)
    assert set(vendors.WORLD) | set(vendors.HELD_OUT) == set(vendors.PACKAGES)


def test_the_table_names_every_drawing_once_and_every_noun_ends_its_phrases():
    names = [entry.name for entry in things.table()]
    assert len(names) == len(set(names))
    assert len(things.kinds()) > 300
    words = " ".join(phrase for entry in things.table() for phrase in (*entry.phrases, entry.kind))
    assert words == words.lower()
    assert set(words) <= set("abcdefghijklmnopqrstuvwxyz ")
