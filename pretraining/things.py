"""What the drawn world holds: kinds of things, in `things.txt`, and the atlas of all drawings of them, taken apart."""

import dataclasses
import functools
import hashlib
import multiprocessing
import pathlib

import numpy as np

from pretraining import drawings, vendors

TABLE = pathlib.Path(__file__).with_name("things.txt")

COMMON_WEIGHT, CORE_WEIGHT = 5.0, 25.0
"""How much more often a common kind is shown than a rare one, and one of the core."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One name of the table: a kind, whether it is common, and of the core of the common ones, the drawing's name, and
    the phrases that may be used for it."""

    kind: str
    common: bool
    core: bool
    name: str
    phrases: tuple[str, ...]

    @property
    def weight(self) -> float:
        """How much more often its kind is shown than a rare one."""
        return CORE_WEIGHT if self.core else COMMON_WEIGHT if self.common else 1.0


@functools.cache
def table() -> tuple[Entry, ...]:
    """All lines of things.txt, a drawing's name each."""
    entries, common = [], True
    for line in TABLE.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line in ("[common]", "[rare]"):
            common = line == "[common]"
        elif line:
            kind, names = line.split(":")
            for item in names.split():
                name, _, words = item.partition("=")
                phrases = tuple(phrase.replace("_", " ") for phrase in words.split("/") if phrase)
                entries.append(Entry(kind.removesuffix("+"), common, kind.endswith("+"), name, phrases))
    return tuple(entries)


@functools.cache
def kinds() -> tuple[str, ...]:
    """Every kind's noun, common ones first, in the order of the table."""
    return tuple(dict.fromkeys(entry.kind for entry in table()))


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Where a drawing of the atlas comes from."""

    entry: Entry
    vendor: str
    name: str


@dataclasses.dataclass(frozen=True)
class Atlas:
    """All drawings of some vendors, taken apart (`drawings.take_apart`).

    Attributes:
        coverages: uint8 [drawings, PARTS, PIXELS, PIXELS].
        colours: uint8 [drawings, PARTS, 3].
        sources: one Drawing each.
    """

    coverages: np.ndarray
    colours: np.ndarray
    sources: tuple[Drawing, ...]


def drawings_of(vendor_names: tuple[str, ...]) -> tuple[Drawing, ...]:
    """Every drawing that the table names and these vendors have; what a vendor draws alike under two names, once."""
    found: dict[tuple[str, str | None], Drawing] = {}
    for entry in table():
        for vendor in vendor_names:
            for name in vendors.names(vendor, entry.name):
                found.setdefault((vendor, vendors.svg(vendor, name)), Drawing(entry, vendor, name))
    return tuple(found.values())


def digest(sources: tuple[Drawing, ...]) -> str:
    """Names all that an atlas is made from: the table, the vendors' archives, which drawings, and how they are taken
    apart."""
    archives = [vendors.fetch(vendor) for vendor in dict.fromkeys(source.vendor for source in sources)]
    told = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (TABLE, *archives)]
    told += [f"{source.vendor} {source.name}" for source in sources]
    told += map(str, (drawings.PARTS, drawings.PIXELS, drawings.RASTER_PIXELS))
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _take_apart(drawing: Drawing) -> tuple[np.ndarray, np.ndarray]:
    svg = vendors.svg(drawing.vendor, drawing.name)
    assert svg is not None
    return drawings.take_apart(svg)


def atlas(vendor_names: tuple[str, ...] = vendors.WORLD) -> Atlas:
    """The atlas of these vendors: taken apart once (a minute or two on two cores), then read from the cache."""
    sources = drawings_of(vendor_names)
    folder = vendors.cache() / f"atlas_{'_'.join(vendor_names)}_{digest(sources)}"
    if not folder.exists():
        # Not forked: whoever scores a model has JAX and its threads in the process.
        with multiprocessing.get_context("spawn").Pool() as pool:
            parts = pool.map(_take_apart, sources, chunksize=8)
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        np.save(partial / "coverages.npy", np.stack([coverages for coverages, _ in parts]))
        np.save(partial / "colours.npy", np.stack([colours for _, colours in parts]))
        partial.rename(folder)
    return Atlas(np.load(folder / "coverages.npy", mmap_mode="r"), np.load(folder / "colours.npy"), sources)
