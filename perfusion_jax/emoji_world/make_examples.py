"""Draw the example concepts: `python -m perfusion_jax.emoji_world.make_examples [--out=DIR]`.

Each is one personal thing, drawn by a vendor that the base model never saw, in a few plain scenes.
Writes DIR/NAME/N.png, DIR/NAME/masks/N.png (white where the thing is) and DIR/NAME/concept.json.
"""

import json
import pathlib

import numpy as np
from absl import app, flags
from PIL import Image

from perfusion_jax.emoji_world import captions, catalogue, descriptions, drawings, scenes
from perfusion_jax.runtime import shipped

OUT = flags.DEFINE_string("out", str(shipped.EXAMPLES), "Folder to write.")

CONCEPTS = {
    "dog": ("dog", "dog-face"),
    "cat": ("cat", "cat-face"),
    "teddy": ("bear", "teddy-bear"),
    "penguin": ("penguin", "penguin"),
    "frog": ("frog", "frog"),
    "jeep": ("car", "sport-utility-vehicle"),
    "camera": ("camera", "camera"),
    "burger": ("burger", "hamburger"),
}
"""Concept name, its super-category, and Iconify's name of the drawing: those that differ clearly from the world's."""

VENDOR = "fluent-emoji-flat"

SHOWN = ("white", "blue", "grass", "table", "grey")
"""Backgrounds of the training pictures, one each. All other places and colours are for testing."""

COLUMNS = (0, -1, 1, 0, 1)
"""How far each picture shows it from the middle, in cells."""


def draw_example(icon_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Training pictures of a held-out drawing.

    Returns:
        (uint8 images [5, 64, 64, 3], uint8 masks [5, 64, 64]).
    """
    sprites = {icon_name: drawings.rasterise(VENDOR, icon_name)[None]}
    pairs = []
    for number, (place, column) in enumerate(zip(SHOWN, COLUMNS, strict=True)):
        thing = descriptions.Thing(icon_name, shift=(column * descriptions.CELL, 0))
        pairs.append(scenes.draw(descriptions.Description((thing,), place, number), sprites))
    return np.stack([image for image, _ in pairs]), np.stack([masks[0] for _, masks in pairs])


def unseen_contexts() -> list[str]:
    """Phrases of the places and backgrounds that no training picture shows: "on the beach", ..."""
    return [
        captions.place_phrase(place)
        for place in (*catalogue.PLACES, *catalogue.BACKGROUND_COLOURS)
        if place not in SHOWN
    ]


def main(_: list[str]) -> None:
    """Draws all example concepts."""
    for name, (category, icon_name) in CONCEPTS.items():
        images, masks = draw_example(icon_name)
        folder = pathlib.Path(OUT.value) / name
        for place, pictures in ((folder, images), (folder / "masks", masks)):
            place.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(pictures):
                Image.fromarray(picture).save(place / f"{number}.png")
        facts = {
            "super_category": category,
            "drawing": f"{catalogue.DRAWING_PACKAGES[VENDOR]}: {icon_name}",
            "licence": "MIT",
            "shown": [captions.place_phrase(place) for place in SHOWN],
            "not_shown": unseen_contexts(),
        }
        (folder / "concept.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
