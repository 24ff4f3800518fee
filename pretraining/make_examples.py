"""Draw the example concepts: `python -m pretraining.make_examples --out=DIR`.

Each is one personal thing by a vendor that no training saw, in pictures as a person has them. Writes DIR/NAME/N.png,
DIR/NAME/masks/N.png (white where the thing is) and DIR/NAME/concept.json.
"""

import json
import pathlib

import torch
from absl import app, flags

from pretraining import captions, held_out, personal, places, vendors
from pretraining.examples import BESIDE, EXAMPLES, PICTURES, SHOWN

OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)


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
