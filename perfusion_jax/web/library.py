"""The concepts of a folder of runs: found, renamed and deleted.

A run's workdir is as the commands leave it. The page names a concept by its key, which is looked up among those that
were found: nothing that a page sends is ever made into a path.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from etils import epath

from perfusion_jax.formats.concept_file import ConceptCard, read_card, write_renamed
from perfusion_jax.learning.report import Report
from perfusion_jax.learning.workdir import CONFIG, METRICS
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import locked, read_text, storage_errors, write_bytes
from perfusion_jax.runtime.names import PLACEHOLDER

_REPORT = "report.jsonl"
_SCORES = ("score", "image_similarity", "text_similarity", "prompt_precision")


@dataclass(frozen=True)
class Entry:
    """A concept of the library.

    Attributes:
        key: what the page calls it, `RUN/NAME`.
        call: its name in the studio's prompts: its own, or with the run's where several have the same.
        file: of the concept.
        workdir: of the run that learnt it.
        card: what the file says.
        grid: the pictures that were drawn of it, or None.
        scores: what they were given, by name.
    """

    key: str
    call: str
    file: Path
    workdir: Path
    card: ConceptCard
    grid: Path | None
    scores: dict[str, float]

    @property
    def alone(self) -> bool:
        """Whether its run is of this concept alone."""
        return not (self.workdir / _REPORT).exists()


def find_entries(runs: Path) -> list[Entry]:
    """All concepts that can be read, in the order of their runs' names."""
    files = sorted(
        file
        for file in runs.glob("*/concepts/*.safetensors")
        if not any(part.startswith(".") for part in file.relative_to(runs).parts)
    )
    found: list[tuple[Path, ConceptCard]] = []
    for file in files:
        try:
            stat = file.stat()
            found.append((file, _card(file, stat.st_mtime_ns, stat.st_size)))
        except (InputError, OSError):  # half copied, or of another program: nothing to draw with
            continue
    names = [card.name for _, card in found]
    entries: list[Entry] = []
    for file, card in found:
        workdir = file.parents[1]
        call = card.name
        if names.count(call) > 1 and workdir.name != call:
            call = f"{call}-{re.sub('[^A-Za-z0-9_-]', '-', workdir.name)}"
        while any(entry.call == call for entry in entries):
            call += "-2"
        key = f"{workdir.name}/{file.stem}"
        entries.append(Entry(key, call, file, workdir, card, _grid(workdir, card), _scores(workdir, card)))
    return entries


@lru_cache(maxsize=1024)
def _card(file: Path, written: int, length: int) -> ConceptCard:
    """Read once for each state of a file."""
    return read_card(file)


def find_entry(runs: Path, key: str) -> Entry:
    """The concept of a key.

    Raises:
        InputError: there is none.
    """
    for entry in find_entries(runs):
        if entry.key == key:
            return entry
    raise InputError(f"{key}: no such concept in the library; it may have been renamed or deleted meanwhile")


def _grid(workdir: Path, card: ConceptCard) -> Path | None:
    samples = workdir / "samples"
    step = f"step_{card.step:06d}.png"
    candidates = [samples / card.name / step, samples / f"{card.name}.png"]
    if not (workdir / _REPORT).exists():
        candidates.append(samples / step)
    return next((file for file in candidates if file.is_file()), None)


def _scores(workdir: Path, card: ConceptCard) -> dict[str, float]:
    """Of the step that was kept; empty where nothing was scored."""
    report = workdir / _REPORT
    fleet = report.exists()
    found: dict[str, Any] = {}
    for line in _lines(report if fleet else workdir / METRICS):
        if (fleet and line.get("name") == card.name) or (
            not fleet and line.get("step") == card.step and "score" in line
        ):
            found = line
    return {name: found[name] for name in _SCORES if isinstance(found.get(name), float)}


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in read_text(epath.Path(file)).splitlines()]
    except (InputError, json.JSONDecodeError):  # being written, or damaged: there is then nothing to show
        return []
    return [line for line in lines if isinstance(line, dict)]


def check_name(name: str) -> str:
    """A concept's name as a person typed it.

    Raises:
        InputError: it cannot be one.
    """
    name = name.strip()
    if not PLACEHOLDER.fullmatch(f"<{name}>"):
        raise InputError(f"the name {name!r}: take letters, digits, '-' and '_', and begin with a letter or a digit")
    return name


def rename(entry: Entry, name: str) -> str:
    """Gives a concept another name: in its file and its file's name, its pictures and its run's records.

    Returns:
        Its key now.

    Raises:
        InputError: the name is taken or cannot be one, or a job is at work in the run.
        UnavailableError: storage fails.
    """
    name, before = check_name(name), entry.card.name
    file = entry.file.with_name(f"{name}.safetensors")
    if name == before:
        return entry.key
    with locked(epath.Path(entry.workdir / "lock"), "stop it first"), storage_errors(entry.workdir, "written"):
        if file.exists():
            raise InputError(f"{file}: there is a concept of that name in this run already")
        alone = entry.alone
        write_renamed(entry.file, file, name)
        for folder, ending in (("samples", ".png"), ("samples", ""), ("exports", "")):
            old = entry.workdir / folder / f"{before}{ending}"
            if old.exists():
                old.replace(old.with_name(f"{name}{ending}"))
        if alone:
            _rename_in_config(entry.workdir / CONFIG, name)
        else:
            # The line of the old name stays: by it the fleet's command knows that nothing is missing.
            report = Report(epath.Path(entry.workdir / _REPORT))
            if before in report.lines:
                report.add([{**report.lines[before], "name": name}])
        entry.file.unlink()
    return f"{entry.workdir.name}/{name}"


def _rename_in_config(file: Path, name: str) -> None:
    try:
        config = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # a concept that was put here without its run
        return
    write_bytes(file, (json.dumps({**config, "name": name}, indent=2, sort_keys=True) + "\n").encode())


def delete(entry: Entry) -> None:
    """Deletes a concept: with all of its run if that has learnt nothing else, else its file, pictures and exports.

    Raises:
        InputError: a job is at work in the run, or it cannot be deleted.
        UnavailableError: storage fails.
    """
    with locked(epath.Path(entry.workdir / "lock"), "stop it first"), storage_errors(entry.workdir, "deleted"):
        others = [file for file in entry.file.parent.glob("*.safetensors") if file != entry.file]
        if entry.alone and not others:
            shutil.rmtree(entry.workdir)
            return
        entry.file.unlink()
        (entry.workdir / "samples" / f"{entry.card.name}.png").unlink(missing_ok=True)
        for folder in ("samples", "exports"):
            shutil.rmtree(entry.workdir / folder / entry.card.name, ignore_errors=True)


def named_in(prompt: str, entries: Sequence[Entry]) -> list[Entry]:
    """The concepts that a prompt names, in the order in which it does.

    Raises:
        InputError: it names one that is not in the library.
    """
    by_call = {entry.call: entry for entry in entries}
    calls = dict.fromkeys(match[0][1:-1] for match in PLACEHOLDER.finditer(prompt))
    missing = next((call for call in calls if call not in by_call), None)
    if missing is not None:
        known = ", ".join(f"<{call}>" for call in by_call) or "none yet: learn one first"
        raise InputError(f"<{missing}> is not in the library; there are {known}")
    return [by_call[call] for call in calls]
