"""Draw the example concepts: `python -m perfusion_jax.emoji_world.make_examples --out=DIR`.

Each is one personal thing, drawn by a vendor that the base model never saw, in a few plain scenes.
Writes DIR/NAME/images/N.png, DIR/NAME/masks/N.png (white where the thing is) and DIR/NAME/concept.json.
"""

import json
import pathlib

import numpy as np
from absl import app, flags
from PIL import Image

from perfusion_jax.emoji_world import captions, catalogue, descriptions, drawings, scenes

OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)

CONCEPTS = {
    "dog": "dog",
    "cat": "cat",
    "penguin": "penguin",
    "frog": "frog",
    "car": "car",
    "shoe": "shoe",
    "camera": "camera",
    "burger": "burger",
}
"""Concept name and its super-category: those whose held-out drawing differs most clearly from the world's."""

VENDOR = "fluent-emoji-flat"

SHOWN = ("white", "blue", "grass", "table", "grey")
"""Backgrounds of the training pictures, one each. All other places and colours are for testing."""

SHIFTS = ((0, 0), (-3, 1), (2, -1), (-1, 0), (3, 1))


def draw_example(category: str) -> tuple[np.ndarray, np.ndarray]:
    """Training pictures of the held-out drawing of `category`.

    Returns:
        (uint8 images [5, 64, 64, 3], uint8 masks [5, 64, 64]).
    """
    sprites = {category: drawings.rasterise(VENDOR, catalogue.ICON_NAMES[category])[None]}
    pairs = [
        scenes.draw(descriptions.Description((descriptions.Thing(category, shift=shift),), place, number), sprites)
        for number, (place, shift) in enumerate(zip(SHOWN, SHIFTS, strict=True))
    ]
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
    for name, category in CONCEPTS.items():
        images, masks = draw_example(category)
        folder = pathlib.Path(OUT.value) / name
        for kind, pictures in (("images", images), ("masks", masks)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / kind / f"{number}.png")
        facts = {
            "super_category": category,
            "drawing": f"{catalogue.DRAWING_PACKAGES[VENDOR]}: {catalogue.ICON_NAMES[category]}",
            "licence": "MIT",
            "shown": [captions.place_phrase(place) for place in SHOWN],
            "not_shown": unseen_contexts(),
        }
        (folder / "concept.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
