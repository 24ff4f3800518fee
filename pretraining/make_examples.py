"""Draw the example concepts: `python -m pretraining.make_examples --out=DIR`.

Each is one personal thing by a vendor that no training saw, in pictures as a person has them. Writes DIR/NAME/N.png,
DIR/NAME/masks/N.png (white where the thing is) and DIR/NAME/concept.json.
"""

import json
import pathlib

import torch
from absl import app, flags

from pretraining import captions, held_out, personal, places, vendors

OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)

EXAMPLES = {
    "dog": personal.Thing("dog", "fluent-flat", "dog-face"),
    "cat": personal.Thing("cat", "fluent-3d", "cat-face"),
    "owl": personal.Thing("owl", "fluent-flat", "owl"),
    "frog": personal.Thing("frog", "fluent-3d", "frog"),
    "penguin": personal.Thing("penguin", "fluent-flat", "penguin"),
    "teddy": personal.Thing("bear", "fluent-3d", "teddy-bear"),
    "jeep": personal.Thing("car", "fluent-flat", "sport-utility-vehicle"),
    "sailboat": personal.Thing("boat", "fluent-3d", "sailboat"),
    "rocket": personal.Thing("rocket", "fluent-flat", "rocket"),
    "burger": personal.Thing("burger", "fluent-3d", "hamburger"),
    "cupcake": personal.Thing("cupcake", "fluent-flat", "cupcake"),
    "teapot": personal.Thing("teapot", "fluent-3d", "teapot"),
    "camera": personal.Thing("camera", "fluent-flat", "camera"),
    "robot": personal.Thing("robot", "fluent-3d", "robot"),
}
"""Name of each concept, and what it is."""

BESIDE = {"teddy": ("fluent-flat", "wrapped-gift"), "jeep": ("fluent-3d", "bicycle")}
"""What stands beside a thing in its first picture."""

PICTURES = 5
SHOWN = (
    "road",
    "white background",
    "room",
    "blue background",
    "sky",
    "grey background",
    "space",
    "yellow background",
)
"""Where the pictures may show things: nothing that validation or the test prompts ask for."""


def large_sprite(vendor: str, drawing: str) -> torch.Tensor:
    """A held-out drawing, large enough for a person's picture: float [4, side, side]."""
    sprite = held_out.sprite(vendor, drawing, personal.SIDE * 3 // 4)
    assert sprite is not None
    return torch.from_numpy(sprite)


def main(_: list[str]) -> None:
    """Draws all example concepts."""
    for number, (name, thing) in enumerate(EXAMPLES.items()):
        beside = [large_sprite(*BESIDE[name])] if name in BESIDE else []
        where = [SHOWN[(number + 3 * picture) % len(SHOWN)] for picture in range(PICTURES)]
        sprite = large_sprite(thing.vendor, thing.drawing)
        pictures, masks, shown = personal.photographs(sprite, PICTURES, 6_000 + number, beside, where)
        folder = pathlib.Path(OUT.value) / name
        personal.write_pictures(folder, pictures, masks)
        facts = {
            "super_category": thing.kind,
            "drawing": f"{vendors.PACKAGES[thing.vendor]}: {thing.drawing}",
            "licence": "MIT",
            "shown": [captions.place_phrase(places.NAMED.index(place)) for place in shown],
            "not_shown": [
                captions.place_phrase(index) for index, place in enumerate(places.NAMED) if place not in SHOWN
            ],
        }
        (folder / "concept.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
