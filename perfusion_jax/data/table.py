"""Reads a table of concepts: a `.csv` or `.jsonl` file, or a folder of concept folders; local or in a bucket.

    name,super_category,pictures,masks,captions,steps,flip
    rex,dog,rex/,,,600,
    my-cup,cup,gs://bucket/cup/,cup_masks/,cup_captions/,,false

`name`, `super_category` and `pictures` (what `config.pictures` takes) are needed. `masks` and `captions` are folders of
files that carry the pictures' names (`data.folders`); left out, they are looked for in the folder of pictures. Every
other column is a key of the config, which it overrides for that concept; an empty cell overrides nothing. A line of
`.jsonl` is an object of the same keys. Paths are relative to the table.

A folder of folders has one concept in each, called as its folder is, with a `concept.json` that has at least
`{"super_category": "dog"}` (and perhaps `licence`) beside the pictures. A folder that cannot be used is its concept's
failure; a line of a table that cannot be used is an error before anything is learnt.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from etils import epath

from perfusion_jax.runtime import shipped
from perfusion_jax.runtime.errors import InputError, UnavailableError
from perfusion_jax.runtime.files import read_text, storage_errors, subfolders, to_path
from perfusion_jax.runtime.names import FACTS, NAME_RULE, PLACEHOLDER

PER_CONCEPT = ("name", "super_category", "pictures")
"""Keys of the config that a table must give of each concept."""

FOLDERS = ("masks", "captions")
TABLES = (".csv", ".jsonl")
EMOJI = "emoji"  # the examples that ship with the package

_SCHEME = re.compile(r"(emoji|tfds):|[a-z0-9]+://|~/")  # emoji:dog, tfds:..., gs://..., ~/dog: not relative to anything


class Row(NamedTuple):
    """A concept of a table.

    Attributes:
        name: of the concept; it names its file, too.
        super_category: the word or words for this kind of thing.
        pictures: as `config.pictures`.
        masks, captions: folders, or empty.
        overrides: values of keys of the config.
        cells: all of it as the line says it, where pictures are relative to the table.
        where: the line that says so, for messages.
        problem: why it cannot be used, or empty.
    """

    name: str
    super_category: str
    pictures: str
    masks: str
    captions: str
    overrides: dict[str, Any]
    cells: dict[str, Any]
    where: str
    problem: str = ""

    @property
    def digest(self) -> str:
        """Of what the line says: what was learnt by another line is not this concept's."""
        return hashlib.sha256(json.dumps(self.cells, sort_keys=True).encode()).hexdigest()[:16]


def read_table(source: str, overridable: Collection[str]) -> list[Row]:
    """Reads all concepts, in the order in which they stand there; folders in the order of their names.

    Args:
        source: a `.csv` or `.jsonl` file, a folder of concept folders, or `emoji` for the examples that ship.
        overridable: keys of the config that a line may give.

    Returns:
        The concepts; of a folder that cannot be used with the `problem`.

    Raises:
        InputError: it is not there, or a line cannot be used; the message names file, line and key.
        UnavailableError: its storage fails.
    """
    path = to_path(shipped.EXAMPLES if source == EMOJI else source)
    rows = _lines(path, overridable) if path.suffix in TABLES else _folders(path)
    if not rows:
        raise InputError(f"{path}: no concepts in it")
    problems = [row.problem or problem for row, problem in zip(rows, _name_problems(rows), strict=True)]
    if path.suffix in TABLES and any(problems):
        raise InputError(next(filter(None, problems)))
    return [row._replace(problem=problem) for row, problem in zip(rows, problems, strict=True)]


def _lines(path: epath.Path, overridable: Collection[str]) -> list[Row]:
    with storage_errors(path, "read"):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # Excel begins its files with a mark
        lines = _csv_lines(path, text) if path.suffix == ".csv" else _json_lines(path, text)
        return [_row(line, where, path.parent, overridable) for where, line in lines]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _folders(path: epath.Path) -> list[Row]:
    inside = subfolders(path)
    if inside is None:
        raise InputError(
            f"{path}: no such folder; config.concepts must be one of concept folders, or a .csv or .jsonl file"
        )
    return [_folder(folder) for folder in inside]


def _folder(folder: epath.Path) -> Row:
    file = folder / FACTS
    cells = {"name": folder.name, "pictures": folder.name}
    try:
        # What else the file says of the concept is for people.
        cells |= {key: value for key, value in _facts(file).items() if key in ("super_category", "licence")}
        if not isinstance(cells.get("licence", ""), str):
            raise InputError(f"{file}: licence is {cells['licence']!r}; it must be text")
        return _row(cells, str(file), folder.parent, ("licence",))
    except UnavailableError:
        raise
    except InputError as error:
        return Row(folder.name, "", str(folder), "", "", {}, cells, str(file), str(error))


def _facts(file: epath.Path) -> dict[str, Any]:
    text = read_text(file)
    if not text:
        raise InputError(f'{file}: missing or empty; it must say {{"super_category": "..."}}')
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers and nesting without end
        raise InputError(f"{file}: not JSON ({error})") from error
    if not isinstance(facts, dict):
        raise InputError(f'{file}: not an object, such as {{"super_category": "..."}}')
    return facts


def _csv_lines(path: epath.Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    columns = reader.fieldnames or ()
    missing = [column for column in PER_CONCEPT if column not in columns]
    if missing:
        for sign, name in ((";", "';'"), ("\t", "tabs")):  # as spreadsheets write where a comma is in numbers
            if len(columns) == 1 and sign in columns[0]:
                raise InputError(f"{path}:1: its columns are separated by {name}: save it with commas between them")
        raise InputError(f"{path}:1: no column {missing[0]!r}; a table needs {', '.join(PER_CONCEPT)}")
    for cells in reader:
        where = f"{path}:{reader.line_num}"
        if None in cells:
            raise InputError(f"{where}: more cells than columns")
        yield where, {key: _cell(key, cell) for key, cell in cells.items() if cell}


def _cell(key: str, text: str) -> Any:
    """A cell's value: names and folders are text, others text, a number or true and false."""
    if key in PER_CONCEPT or key in FOLDERS:
        return text
    try:
        return json.loads(text.lower())
    except (ValueError, RecursionError):
        return text


def _json_lines(path: epath.Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            facts = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})") from error
        if not isinstance(facts, dict):
            raise InputError(f'{where}: not an object, such as {{"name": "rex", ...}}')
        yield where, facts


def _row(facts: dict[str, Any], where: str, parent: epath.Path, overridable: Collection[str]) -> Row:
    texts = {}
    for key in (*PER_CONCEPT, *FOLDERS):
        value = facts.get(key, "")
        if not isinstance(value, str) or (key in PER_CONCEPT and not value):
            problem = "is missing" if value == "" else f"is {value!r}; it must be text"
            raise InputError(f"{where}: {key} {problem}")
        texts[key] = value
    overrides = {key: value for key, value in facts.items() if key not in texts}
    unknown = sorted(overrides.keys() - set(overridable))
    if unknown:
        known = ", ".join([*PER_CONCEPT, *FOLDERS, *overridable])
        raise InputError(f"{where}: {unknown[0]} is not a key of the table; these are: {known}")
    for key in ("pictures", *FOLDERS):
        if texts[key] and not _SCHEME.match(texts[key]):
            texts[key] = str(parent / texts[key])
    return Row(**texts, overrides=overrides, cells=facts, where=where)


def _name_problems(rows: list[Row]) -> Iterator[str]:
    seen: dict[str, Row] = {}
    for row in rows:
        # Some file systems take Rex and rex for one.
        earlier = seen.setdefault(row.name.casefold(), row)
        if not PLACEHOLDER.fullmatch(f"<{row.name}>"):
            yield f"{row.where}: name is {row.name!r}; it must be {NAME_RULE}"
        elif earlier is not row:
            yield f"{row.where}: name is {row.name!r}, as in {earlier.where}; rename one"
        else:
            yield ""
