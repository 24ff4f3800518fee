"""Whose drawings there are, which of them the models may see, and how they are fetched from the npm registry.

`python -m pretraining.vendors` downloads all packages into the cache: 25 MB, a minute; it needs the `npm` command.
Running it again does nothing.
"""

import functools
import json
import os
import pathlib
import subprocess
import tarfile
import tempfile
from typing import Any

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "streamline": "@iconify-json/streamline-emojis@1.2.4",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
}
"""npm package and version of each vendor's drawings. Licences stand in `NOTICE`."""

WORLD = ("noto", "noto-v1", "twemoji", "emojione", "fxemoji", "streamline")
"""Vendors that the models are trained on."""

HELD_OUT = ("fluent-flat", "fluent-3d")
"""Vendors that no training sees: personal things are drawn by them."""


def cache() -> pathlib.Path:
    """Folder of all that pretraining fetches or computes; the variable DRAWN_WORLD_CACHE moves it."""
    default = pathlib.Path.home() / ".cache" / "perfusion_jax" / "drawn_world"
    return pathlib.Path(os.environ.get("DRAWN_WORLD_CACHE", default))


def fetch(vendor: str) -> pathlib.Path:
    """The archive of one vendor's package, downloaded if it is not there."""
    archive = cache() / "drawings" / f"{vendor}.tgz"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            subprocess.run(["npm", "pack", "--silent", PACKAGES[vendor]], cwd=folder, check=True)
            (packed,) = pathlib.Path(folder).glob("*.tgz")
            packed.rename(archive)
    return archive


@functools.cache
def icon_set(vendor: str) -> dict[str, Any]:
    """Parsed Iconify json of one vendor of vector drawings."""
    with tarfile.open(fetch(vendor)) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None
        return json.load(member)


def svg(vendor: str, name: str) -> str | None:
    """One vector drawing as SVG text with a viewBox and no size; None if the vendor has none of that name.

    Some vendors draw variants of one name ("cat-1", "cat-2") or write it in one word ("alarmclock"): see `names`.
    """
    icons = icon_set(vendor)
    while name in icons.get("aliases", {}) and name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    if name not in icons["icons"]:
        return None
    icon = icons["icons"][name]
    sides = [icon.get(side, icons.get(side, 16)) for side in ("width", "height")]
    corner = f"{icon.get('left', 0)} {icon.get('top', 0)}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{corner} {sides[0]} {sides[1]}">{icon["body"]}</svg>'
    )


def names(vendor: str, name: str) -> list[str]:
    """The vendor's own names for its drawings of `name`: the same, several with a number, or one without hyphens."""
    known = icon_set(vendor)
    known = {*known["icons"], *known.get("aliases", {})}
    numbered = [f"{name}-{number}" for number in range(1, 6)]
    found = [candidate for candidate in (name, *numbered) if candidate in known]
    if vendor == "fxemoji" and not found:
        found = [own for own in (FXEMOJI.get(name, name.replace("-", "")),) if own in known]
    return found


FXEMOJI = {
    "dog-face": "dog",
    "dog": "dogside",
    "cat-face": "cat",
    "cat": "catside",
    "horse-face": "horseface",
    "rabbit-face": "bunny",
    "rabbit": "bunnyside",
    "pig-face": "pig",
    "pig": "pigside",
    "mouse-face": "mouse",
    "mouse": "mouseside",
    "tiger-face": "tiger",
    "tiger": "tigerside",
    "leopard": "leopardside",
    "wolf": "wolfface",
    "panda": "pandaface",
    "fox": "foxgrin",
    "hamster": "hampster",
    "dragon-face": "dragonhead",
    "dragon": "dragonside",
    "camel": "dromedarycamel",
    "two-hump-camel": "bactriancamel",
    "baby-chick": "babychick",
    "front-facing-baby-chick": "frontfacingchick",
    "spouting-whale": "spurtingwhale",
    "ewe": "sheep",
    "dove": "doveofpeace",
    "sport-utility-vehicle": "recreationalvehicle",
    "racing-car": "racecar",
    "articulated-lorry": "articulatedlorry",
    "bullet-train": "highspeedtrainbulletnose",
    "locomotive": "steamlocomotive",
    "house": "housebuilding",
    "castle": "europeancastle",
    "japanese-castle": "japanesecastle",
    "evergreen-tree": "evergreen",
    "ear-of-corn": "earofmaize",
    "hot-pepper": "chilipepper",
    "eggplant": "aubergine",
    "soft-ice-cream": "softicecream",
    "ice-cream": "icecream",
    "wrapped-gift": "present",
    "telephone": "blacktelephone",
    "mobile-phone": "cellphone",
    "handbag": "handbag",
    "backpack": "schoolsatchel",
    "mans-shoe": "mensshoe",
    "high-heeled-shoe": "heels",
    "womans-boot": "boot",
    "womans-sandal": "sandals",
    "t-shirt": "mansshirt",
    "umbrella-with-rain-drops": "umbrellawithraindrops",
    "umbrella-on-ground": "beachumbrella",
    "locked": "lock",
    "unlocked": "openlock",
    "light-bulb": "lightbulb",
    "flashlight": "electrictorch",
    "globe-showing-americas": "americasglobe",
    "globe-showing-europe-africa": "europeafricaglobe",
    "globe-showing-asia-australia": "asiaaustraliaglobe",
    "scissors": "blackscissors",
    "star": "whitemediumstar",
    "sun-with-face": "sunwithface",
    "snow-capped-mountain": "snowmountains",
    "mount-fuji": "mountfuji",
    "bathtub": "bathtub",
    "red-apple": "redapple",
    "moai": "moyai",
    "teacup-without-handle": "teacupwithouthandle",
    "tokyo-tower": "toykotower",
    "tennis": "tennisball",
    "basketball": "basketballandhoop",
}
"""fxemoji's own names where leaving the hyphens out does not give them."""


def main() -> None:
    """Fetches all vendors' drawings."""
    for vendor in PACKAGES:
        print(f"{vendor}: {fetch(vendor)}")


if __name__ == "__main__":
    main()
