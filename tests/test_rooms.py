"""The floors of the house: a room imports rooms of lower floors alone (docs/architecture.md)."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import perfusion_jax

PACKAGE = Path(perfusion_jax.__file__).parent
FLOORS = (
    {"runtime", "method"},
    {"pod", "base_model"},
    {"formats", "data"},
    {"drawing", "config"},
    {"learning"},
    {"evaluation", "web"},
    {"train", "sample", "evaluate", "export", "covariance", "compile", "studio"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Beside the package, and not in its wheel.
BESIDE = ("benchmarks", "pretraining", "tests", "configs", "launch")
# What the package offers as a whole.
OFFERED = {"__init__"}
# The model that ships and the code that made it; nothing imports it.
APART = {"emoji_world"}


def room_of(file):
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(file, text):
    """The modules that a file of the package imports, by their whole names."""
    package = ("perfusion_jax", *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from [f"{module}.{alias.name}" for alias in node.names] if module == "perfusion_jax" else [module]


def wrong_imports(file, text):
    """What a file imports though it must not: its own floor, a higher one, or what is no part of the package."""
    for module in imported(file, text):
        first, _, rest = module.partition(".")
        room = rest.split(".")[0] if first == "perfusion_jax" else ""
        if room and room != room_of(file) and not FLOOR_OF.get(room, len(FLOORS)) < FLOOR_OF[room_of(file)]:
            yield room
        if first in BESIDE:
            yield first


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("data/table.py", "from perfusion_jax.runtime import files\nfrom perfusion_jax.data import masks", []),
        (
            "data/table.py",
            "from perfusion_jax.drawing.grids import grid\nimport perfusion_jax.web.jobs",
            ["drawing", "web"],
        ),
        ("data/table.py", "from perfusion_jax import formats", ["formats"]),
        ("data/table.py", "from . import masks\nfrom .masks import shrink\nfrom ..runtime import files", []),
        ("data/table.py", "from ..drawing.grids import grid\nfrom .. import web", ["drawing", "web"]),
        ("train.py", "from . import studio\nfrom .learning import runs", ["studio"]),
        (
            "train.py",
            "import benchmarks.claims\nfrom pretraining import scenes\nfrom tests.oracle import x",
            [*BESIDE][:3],
        ),
    ],
)
def test_wrong_imports_are_found(file, text, wrong):
    assert list(wrong_imports(PACKAGE / file, text)) == wrong


def test_every_room_imports_lower_floors_alone():
    files = [file for file in PACKAGE.rglob("*.py") if room_of(file) not in OFFERED | APART]
    assert {room_of(file) for file in files} == set(FLOOR_OF)
    assert not [
        f"{file.relative_to(PACKAGE)} imports {wrong}"
        for file in files
        for wrong in wrong_imports(file, file.read_text())
    ]


def test_no_module_imports_itself_by_way_of_others():
    names = {
        ".".join(("perfusion_jax", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    arrows = {
        name: {
            inner if (inner := f"{node.module}.{alias.name}") in names else node.module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        & names.keys() - {"perfusion_jax"}
        for name, file in names.items()
        if room_of(file) not in OFFERED
    }
    assert len(list(TopologicalSorter(arrows).static_order())) == len(arrows)


def test_the_base_model_alone_knows_diffusers_and_transformers():
    knowing = {
        room_of(file)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if module.split(".")[0] in ("diffusers", "transformers")
    }
    assert knowing <= {"base_model"} | APART
