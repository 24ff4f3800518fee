"""The concepts of a folder of runs: found, renamed and deleted.

A run's workdir is as the commands leave it. The page names a concept by its key, which is looked up among those that
were found. Of what a page sends, a new name alone becomes part of a path, when it was checked.
"""

import json
import re
import secrets
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from perfusion_jax.formats.concept_file import ConceptCard, read_card, write_renamed
from perfusion_jax.learning.report import Report
from perfusion_jax.learning.workdir import (
    CONCEPTS,
    CONFIG,
    EXPORTS,
    LOCK,
    METRICS,
    REPORT,
    SAMPLES,
    WRITTEN,
    concept_file,
)
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import locked, read_text, storage_errors, write_bytes
from perfusion_jax.runtime.names import PLACEHOLDER, STUDIO

TABLE = "concepts.jsonl"
"""The table of a fleet that the studio made, in its workdir."""

PICTURES = "pictures"
"""Folder of the pictures that things are learnt from, among the runs."""

LONGEST = 60  # letters of a name, which becomes a file's and with its run's name a prompt's

# All that a run writes into its workdir but concepts and exports, in the order in which it is deleted: without its
# config, which is the first, it is no run that could be gone on with.
_WRITTEN = (*(name for name in WRITTEN if name not in (CONCEPTS, EXPORTS)), TABLE)
_SHARD = "shard_*_of_*"
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
        return not (self.workdir / REPORT).exists() and not shards(self.workdir)


def shards(workdir: Path) -> list[Path]:
    """The folders of the jobs of a fleet that was split."""
    return sorted(workdir.glob(_SHARD))


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds the locks of a run, so that no job is at work in it.

    Raises:
        InputError: one is.
    """
    with ExitStack() as stack:
        for folder in (workdir, *shards(workdir)):
            stack.enter_context(locked(epath.Path(folder / LOCK), "stop it first"))
        yield


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
            found.append((file, _card(file)))
        except (InputError, OSError):  # half copied, or of another program: nothing to draw with
            continue
    names = Counter(card.name for _, card in found)
    entries: list[Entry] = []
    calls: set[str] = set()
    logged: dict[Path, dict[str | int, dict[str, Any]]] = {}  # of each run, read once
    for file, card in found:
        workdir = file.parents[1]
        call = card.name
        if names[call] > 1 and workdir.name != call:
            call = f"{call}-{re.sub('[^A-Za-z0-9_-]', '-', workdir.name)}"
        while call in calls:
            call += "-2"
        calls.add(call)
        key = f"{workdir.name}/{file.stem}"
        if workdir not in logged:
            logged[workdir] = _scored(workdir)
        entries.append(Entry(key, call, file, workdir, card, _grid(workdir, card), _scores(card, logged[workdir])))
    return entries


_cards: dict[Path, tuple[tuple[int, int], ConceptCard]] = {}  # with the state of the file that they were read in


def _card(file: Path) -> ConceptCard:
    """Read once for each state of a file."""
    stat = file.stat()
    state = (stat.st_mtime_ns, stat.st_size)
    known = _cards.get(file)
    if known is None or known[0] != state:
        known = _cards[file] = (state, read_card(file))
    return known[1]


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
    samples = workdir / SAMPLES
    step = f"step_{card.step:06d}.png"
    candidates = [samples / card.name / step, samples / f"{card.name}.png"]
    candidates.append(samples / step)  # of a run of one concept
    return next((file for file in candidates if file.is_file()), None)


def _logged(workdir: Path) -> list[dict[str, Any]]:
    """What a run says of its scores: lines of its report, or of all its shards', or else of its log."""
    reports = [folder / REPORT for folder in (workdir, *shards(workdir)) if (folder / REPORT).exists()]
    return [line for file in reports or [workdir / METRICS] for line in _lines(file)]


def _scored(workdir: Path) -> dict[str | int, dict[str, Any]]:
    """The last scores that a run tells of each concept, by its name; or else of each step."""
    found: dict[str | int, dict[str, Any]] = {}
    for line in _logged(workdir):
        own = line.get("name", line.get("step"))
        if "score" in line and isinstance(own, (str, int)):
            found[own] = line
    return found


def _scores(card: ConceptCard, scored: dict[str | int, dict[str, Any]]) -> dict[str, float]:
    """Of the step that was kept; empty where nothing was scored."""
    found = scored.get(card.name) or scored.get(card.step) or {}
    return {name: found[name] for name in _SCORES if isinstance(found.get(name), float)}


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in read_text(epath.Path(file)).splitlines()]
    except (InputError, ValueError, RecursionError):  # being written, or damaged: there is then nothing to show
        return []
    return [line for line in lines if isinstance(line, dict)]


def check_name(name: str) -> str:
    """A concept's name as a person typed it.

    Raises:
        InputError: it cannot be one; one that can is proposed.
    """
    name = name.strip()
    if not PLACEHOLDER.fullmatch(f"<{name}>") or len(name) > LONGEST:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        near = re.sub("[^A-Za-z0-9_]+", "-", plain).strip("-_")[:LONGEST]
        raise InputError(
            f"the name {name[:LONGEST]!r}: take letters from a to z, digits, '-' and '_', at most {LONGEST}, and begin "
            f"with a letter or a digit{f', such as {near}' if near else ''}"
        )
    return name


def rename(entry: Entry, name: str) -> str:
    """Gives a concept another name: in its file and its file's name, its pictures and its run's records.

    Returns:
        Its key now.

    Raises:
        InputError: the name is taken or cannot be one, or a job is at work in the run.
        UnavailableError: storage fails.
    """
    name, before, workdir = check_name(name), entry.card.name, entry.workdir
    if name == before:
        return entry.key
    file = entry.file.with_name(f"{name}.safetensors")
    with held(workdir), storage_errors(workdir, "written"):
        alone = entry.alone
        folder = next((each for each in shards(workdir) if _has_line(each, before)), workdir)
        _check_free_in(workdir, name)
        write_renamed(entry.file, file, name)
        for place, ending in ((SAMPLES, ".png"), (SAMPLES, ""), (EXPORTS, "")):
            old = workdir / place / f"{before}{ending}"
            if old.exists():
                old.replace(old.with_name(f"{name}{ending}"))
        if alone:
            _rename_in_config(workdir / CONFIG, name)
        else:
            # The line of the old name stays: by it the fleet's command knows that nothing is missing.
            report = Report(epath.Path(folder / REPORT))
            if before in report.lines:
                report.add([{**report.lines[before], "name": name}])
        entry.file.unlink()
    return f"{workdir.name}/{name}"


def _has_line(folder: Path, name: str) -> bool:
    return any(line.get("name") == name for line in _lines(folder / REPORT))


def _check_free_in(workdir: Path, name: str) -> None:
    """Sees that nothing in a run is called so, nor will be: a member of a fleet that is still to be learnt.

    Raises:
        InputError: something is.
    """
    taken = {line.get("name") for line in _logged(workdir)} | {line.get("name") for line in _lines(workdir / TABLE)}
    files = [Path(concept_file(epath.Path(workdir), name)), workdir / SAMPLES / name, workdir / EXPORTS / name]
    if name in taken or any(file.exists() for file in (*files, workdir / SAMPLES / f"{name}.png")):
        raise InputError(f"{workdir}: there is a {name} in this run already: take another name")


def _rename_in_config(file: Path, name: str) -> None:
    try:
        config = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # a concept that was put here without its run
        return
    write_bytes(file, (json.dumps({**config, "name": name}, indent=2, sort_keys=True) + "\n").encode())


class Doomed(NamedTuple):
    """What goes when something is deleted.

    Attributes:
        files: files and folders, in the order in which they go.
        photographs: the folder of the pictures that it was learnt from, if the studio keeps them; they stay unless a
            person says otherwise.
    """

    files: list[Path]
    photographs: Path | None


def doomed_with(entry: Entry) -> Doomed:
    """What goes with a concept: its run if that is of this concept alone, else its file, pictures and exports."""
    workdir, name = entry.workdir, entry.card.name
    config = _config(workdir)
    others = [file for file in entry.file.parent.glob("*.safetensors") if file != entry.file]
    own = config.get("name") == name and not config.get("concepts")
    files = [entry.file, workdir / SAMPLES / f"{name}.png", workdir / SAMPLES / name, workdir / EXPORTS / name]
    if entry.alone and own and not others:
        files = [workdir / CONFIG, *files, *(workdir / each for each in _WRITTEN[1:])]
    elif not config:
        files.append(workdir / LOCK)  # of `held`
    pictures = config.get("pictures") if own else None
    for row in [] if own else _lines(workdir / TABLE):
        if row.get("name") == name:
            pictures = row.get("pictures")
    return Doomed([file for file in files if file.exists()], _kept_for(workdir, pictures))


def doomed_run(workdir: Path) -> Doomed:
    """What goes with a run: all that it wrote, finished concepts with it."""
    files = [workdir / TABLE, workdir / LOCK]  # of a fleet that has not begun
    if (workdir / CONFIG).exists():
        found = sorted((workdir / CONCEPTS).glob("*.safetensors"))
        written = [folder / name for name in _WRITTEN for folder in (workdir, *shards(workdir))]
        files = [workdir / CONFIG, *found, *(workdir / EXPORTS / file.stem for file in found), *written]
    return Doomed(
        [file for file in dict.fromkeys(files) if file.exists()],
        _kept_for(workdir, _config(workdir).get("pictures")),
    )


def _config(workdir: Path) -> dict[str, Any]:
    """The config of a run; empty where there is none that can be read."""
    try:
        config = json.loads(read_text(epath.Path(workdir / CONFIG)) or "{}")
    except (InputError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _kept_for(workdir: Path, pictures: Any) -> Path | None:
    """The studio's folder of a run's pictures, if it keeps them and no other run is learnt from them."""
    runs = workdir.parent
    for folder in (runs / PICTURES).glob("*"):
        if str(folder) == pictures and folder.is_dir():
            others = [file.parent for file in runs.glob(f"*/{CONFIG}") if file.parent != workdir]
            return None if any(_config(other).get("pictures") == pictures for other in others) else folder
    return None


def delete(entry: Entry, photographs: bool = False) -> None:
    """Deletes a concept.

    Args:
        entry: which.
        photographs: whether the pictures that it was learnt from go too, if the studio keeps them.

    Raises:
        InputError: a job is at work in the run, or it cannot be deleted.
        UnavailableError: storage fails.
    """
    with held(entry.workdir):
        _discard(entry.workdir, doomed_with(entry), photographs)


def delete_run(workdir: Path, photographs: bool = False) -> None:
    """Deletes all that a run has written; arguments and errors as for `delete`."""
    if not workdir.is_dir():
        return
    with held(workdir):
        _discard(workdir, doomed_run(workdir), photographs)


def _discard(workdir: Path, doomed: Doomed, photographs: bool) -> None:
    """Moves files and folders out of sight, which is quick, and deletes them there: a kill leaves no half of a run."""
    files = [*doomed.files, doomed.photographs] if photographs and doomed.photographs else doomed.files
    trash = workdir.parent / STUDIO / "trash" / secrets.token_hex(8)
    with storage_errors(workdir, "deleted"):
        trash.mkdir(parents=True)
        for number, file in enumerate(files):
            file.rename(trash / f"{number}")
        for folder in (*(workdir / name for name in (CONCEPTS, SAMPLES, EXPORTS)), *shards(workdir), workdir):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
    shutil.rmtree(trash, ignore_errors=True)  # what is left goes when the studio starts


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
