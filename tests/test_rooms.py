"""The floors of the house: a room imports rooms of lower floors alone (docs/architecture.md)."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

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
# What the package offers as a whole.
OFFERED = {"__init__"}
# The model that ships and the code that made it; nothing imports it.
APART = {"emoji_world"}


def room_of(file):
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = inside if node.module == "perfusion_jax" else [node.module]
        else:
            continue
        yield from (module.split(".")[1] for module in modules if module.startswith("perfusion_jax."))


def test_every_room_imports_lower_floors_alone():
    files = [file for file in PACKAGE.rglob("*.py") if room_of(file) not in OFFERED | APART]
    assert {room_of(file) for file in files} == set(FLOOR_OF)
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {room}"
        for file in files
        for room in imported_rooms(file)
        if room != room_of(file) and not FLOOR_OF.get(room, len(FLOORS)) < FLOOR_OF[room_of(file)]
    ]
    assert not wrong


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
