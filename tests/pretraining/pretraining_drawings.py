"""A small atlas of drawings made here, so that the tests of pretraining need no network."""

import functools

import numpy as np

from pretraining import drawings, things

FACE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100"><circle cx="50" cy="50" r="45" fill="#c86432"/>'
    '<circle cx="35" cy="40" r="8"/><circle cx="65" cy="40" r="8"/>'
    '<path d="M30 65h40v8H30z" fill="white" stroke="rgb(200, 0, 0)" stroke-width="2"/></svg>'
)
BOX = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 32"><linearGradient id="g"><stop stop-color="#ff0000"/>'
    '<stop offset="1" style="stop-color:#0000ff;stop-opacity:.5"/></linearGradient>'
    '<path d="M0 0h64v32H0z" fill="url(#g)"/><path d="M8 8h16v16H8z" fill="#0f0" opacity=".5"/></svg>'
)
HAT = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 30">'
    '<path d="M10 0h20v24h10v6H0v-6h10z" fill="#202060"/></svg>'
)


@functools.cache
def atlas() -> things.Atlas:
    """A dog's face by two vendors, a package and a hat."""
    rows = (
        (things.Entry("dog", True, True, "dog-face", ("guide dog",)), "noto", FACE),
        (things.Entry("dog", True, True, "dog-face", ()), "twemoji", FACE.replace("#c86432", "#3c78c8")),
        (things.Entry("box", False, False, "package", ()), "noto", BOX),
        (things.Entry("hat", True, False, "top-hat", ("top hat",)), "noto", HAT),
    )
    parts = [drawings.take_apart(svg) for _, _, svg in rows]
    return things.Atlas(
        np.stack([coverages for coverages, _ in parts]),
        np.stack([colours for _, colours in parts]),
        tuple(things.Drawing(entry, vendor, entry.name) for entry, vendor, _ in rows),
    )
