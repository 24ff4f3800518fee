"""The studio: what the page asks for, as methods that take and give plain JSON.

Every one of them calls what the commands call. What is wrong with what a person sent is an InputError.
"""

import hashlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from perfusion_jax.data.pictures import open_picture
from perfusion_jax.drawing.controls import SLOTS
from perfusion_jax.drawing.prompts import escaped, without_syntax
from perfusion_jax.drawing.recipe import CONTROLS, Recipe, command_of, read_recipe
from perfusion_jax.formats.concept_file import PERFUSION, load_concept
from perfusion_jax.formats.exporting import KINDS, export
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.names import SAMPLERS, SPACINGS, STUDIO
from perfusion_jax.web import jobs as queue
from perfusion_jax.web.easel import DRAWINGS, Easel, entries_of
from perfusion_jax.web.forms import Form, thing_config
from perfusion_jax.web.intake import PICTURES, SHOWN_SIDE, Preview, ending_of, folder_for, keep, new_draft, preview
from perfusion_jax.web.jobs import LEARNING, Job, Jobs
from perfusion_jax.web.library import Entry, check_name, delete, find_entries, find_entry, named_in, rename

EXPORTS = "exports"
"""Folder of what was exported, among the runs."""

RESERVED = (EXPORTS, DRAWINGS, PICTURES)
"""Folders among the runs that are no runs."""

MOST_DRAWN = 64  # pictures of one request
SHOWN_BEFORE = 48  # earlier drawings
MOST_VIEWS = 1000


@dataclass(frozen=True)
class Draft:
    """Pictures that a person has dropped, before they are learnt.

    Attributes:
        folder: where they lie.
        names: what the person called them.
    """

    folder: Path
    names: tuple[str, ...]


@dataclass
class Studio:
    """A folder of runs, with what draws and what learns.

    Attributes:
        runs: the folder.
        easel: draws.
        jobs: learns.
        drafts: pictures that were dropped, by a name of the studio's own.
    """

    runs: Path
    easel: Easel
    jobs: Jobs
    drafts: dict[str, Draft] = field(default_factory=dict)
    _newest: dict[str, object] = field(default_factory=dict)  # drawing of each view of the page
    _starting: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, runs: Path, base: dict[str, str | None]) -> "Studio":
        """The studio of a folder; what waits in its queue is begun.

        Args:
            runs: the folder; it is made.
            base: keyword arguments of `load_base_model`.
        """
        runs = runs.resolve()
        runs.mkdir(parents=True, exist_ok=True)
        for left in (runs / STUDIO / "uploads").glob("*"):  # by a studio that was killed
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        studio = cls(runs, Easel(runs, base), Jobs(runs))
        studio.jobs.start()
        return studio

    def state(self) -> dict[str, Any]:
        """All that changes by itself: the library, the queue, and earlier drawings."""
        running = next((job for job in self.jobs.snapshot() if job.state == LEARNING), None)
        grid = _latest_grid(self.runs / running.run) if running else None
        return {
            "base": self.easel.source["source"],
            "sampler": self.easel.quick_sampler,
            "problem": self.easel.failure,
            "entries": [self._entry(entry) for entry in find_entries(self.runs)],
            "jobs": [self._job(job) for job in self.jobs.snapshot()],
            "interrupted": self.jobs.interrupted(),
            "grid": str(grid.stat().st_mtime_ns) if grid else "",
            "drawings": [file.name for file in self.easel.drawn_before(SHOWN_BEFORE)],
        }

    def _entry(self, entry: Entry) -> dict[str, Any]:
        card = entry.card
        return {
            "key": entry.key,
            "call": entry.call,
            "name": card.name,
            "kind": card.super_category,
            "phrase": card.phrase.replace(card.placeholder, f"<{entry.call}>"),
            "drawable": self.easel.can_draw(entry),
            "gated": card.method == PERFUSION,
            "bias": card.bias,
            "temperature": card.temperature,
            "grid": str(entry.grid.stat().st_mtime_ns) if entry.grid else "",
            "facts": {
                "in prompts": f"<{entry.call}>",
                "kind": card.super_category,
                "learnt by": card.method,
                "step": str(card.step),
                **{name.replace("_", " "): f"{value:.3f}" for name, value in entry.scores.items()},
                "bias": f"{card.bias:g}",
                "temperature": f"{card.temperature:g}",
                "base model": card.base_model,
                "licence": card.licence or "not said",
                "file": str(entry.file),
                "size": f"{entry.file.stat().st_size / 1000:.0f} KB",
            },
        }

    def _job(self, job: Job) -> dict[str, Any]:
        progress = self.jobs.progress() if job.state == LEARNING else None
        return {
            "run": job.run,
            "things": [f"{name}, a {kind}" if kind else name for name, kind in zip(job.names, job.kinds, strict=True)],
            "state": job.state,
            "error": job.error,
            "warnings": list(dict.fromkeys(self.jobs.warnings)) if job.state == LEARNING else [],
            "command": queue.command_of(job, self.runs),
            "progress": progress._asdict() if progress else None,
        }

    def grid_of(self, key: str) -> Path:
        """The pictures by which a concept of the library was scored; without a key, the latest of what is learnt.

        Raises:
            InputError: there are none.
        """
        if key:
            grid = find_entry(self.runs, key).grid
        else:
            learning = [job for job in self.jobs.snapshot() if job.state == LEARNING]
            grid = _latest_grid(self.runs / learning[0].run) if learning else None
        if grid is None:
            raise InputError("there are no pictures of it yet")
        return grid

    # Learning.

    def drop(self, files: Sequence[Path], names: Sequence[str]) -> dict[str, Any]:
        """Takes pictures in; `files` as they were uploaded, `names` as the person calls them."""
        folder = new_draft(self.runs, files, names)
        self.drafts[folder.name] = Draft(folder, tuple(names))
        return {"draft": folder.name}

    def warning(self, kind: str) -> str:
        """What is odd about a kind of thing, or empty."""
        found = self.easel.base.model.tokenizer.in_pieces(kind)
        odd = [
            f"the model has no word {word!r}" + (f"; near ones are {', '.join(near)}" if near else "")
            for word, near in found.items()
        ]
        return "; ".join(odd) + ": take a common word for this kind of thing" if odd else ""

    def _draft(self, form: Form) -> Draft:
        draft = self.drafts.get(form.text("draft"))
        if draft is None or not draft.folder.is_dir():
            raise InputError("the pictures are not here any more: drop them again")
        return draft

    def look(self, form: Form) -> tuple[str, list[Preview]]:
        """What training will see of a draft: a warning or nothing, and each picture with its mask."""
        draft = self._draft(form)
        config = thing_config(self.easel.source, form, check_name(form.text("name") or "thing"), str(draft.folder))
        try:
            shown = preview(config, self.easel.base, draft.folder, draft.names)
        except InputError as error:
            raise InputError(_in_their_words(str(error), draft)) from error
        return self.warning(config.super_category), shown

    def learn(self, form: Form) -> dict[str, Any]:
        """Puts a draft into the queue, by the name and kind of the form.

        `painted` in the form holds the masks of all its pictures, if one of them was painted. What cannot be learnt is
        refused now, and not when its turn comes.
        """
        name = check_name(form.text("name"))
        if name in RESERVED:
            raise InputError(f"the name {name!r} is one of the studio's own folders: take another")
        self.jobs.check_free(name)
        draft = self._draft(form)
        files = sorted(draft.folder.glob("picture_*"))
        painted = self._painted(form)
        if painted and len(painted) != len(files):
            raise InputError(f"{len(painted)} masks of {len(files)} pictures were sent")
        self.look(form)
        with self._starting:
            self.jobs.check_free(name)
            folder = folder_for(self.runs, name)
            config = thing_config(self.easel.source, form, name, str(folder))
            if painted:
                config.masks = "files"
            masks = {file.stem: mask for file, mask in zip(files, painted, strict=True)} if painted else {}
            keep(draft.folder, folder, masks, config.crop)
            del self.drafts[draft.folder.name]
            self.jobs.add(config)
        return {"warning": self.warning(config.super_category)}

    def _painted(self, form: Form) -> list[np.ndarray]:
        masks, found = form.part("painted"), []
        for number in range(len(form.parts("painted"))):
            pixels = masks.picture(str(number), SHOWN_SIDE, "L")
            if pixels is None:
                raise InputError(f"painted: there is no mask of picture {number + 1}")
            if pixels.max() == 0:
                raise InputError(f"picture {number + 1}: nothing of it would be learnt: paint what is the thing")
            found.append(pixels.astype(np.float32) / 255)
        return found

    def act(self, act: str, run: str) -> None:
        """Stops a run, lets it go on, takes it out of the queue, or takes one that a command began into it."""
        acts = {
            "stop": self.jobs.stop,
            "go_on": self.jobs.go_on,
            "forget": self.jobs.forget,
            "adopt": self.jobs.adopt,
        }
        if act not in acts:
            raise InputError(f"{act}: no such act")
        acts[act](run)

    # Drawing.

    def _drawable(self) -> list[Entry]:
        return [entry for entry in find_entries(self.runs) if self.easel.can_draw(entry)]

    def recipe(self, form: Form) -> Recipe:
        """What a form asks to be drawn."""
        prompt = form.text("prompt")
        if not prompt:
            raise InputError("the prompt is empty: say what to draw, such as a photo of a <dog> on the beach")
        entries = named_in(prompt, self._drawable())
        if len(entries) > SLOTS:
            raise InputError(f"{len(entries)} concepts: the studio draws {SLOTS} in one prompt")
        options: dict[str, Any] = {
            "negative_prompt": form.text("negative_prompt") or None,
            "guidance": form.number("guidance", 0, 100),
            "guidance_rescale": form.number("guidance_rescale", 0, 1) or 0.0,
            "sampler": form.one_of("sampler", ("", *SAMPLERS)) or None,
            "steps": form.whole("steps", 1, 1000),
            "spacing": form.one_of("spacing", ("", *SPACINGS)) or None,
            "lock": form.one_of("lock", ("local", "global")),
            "width": form.whole("width", 8, 4096),
            "height": form.whole("height", 8, 4096),
            "init_strength": form.number("init_strength", 0.01, 1) or 0.8,
            **_controls(form.part("concepts"), entries),
        }
        sweep = None
        if swept := form.part("sweep").text("control"):
            sweep = _sweep(form.part("sweep"), swept)
        init = form.text("init_image")
        start = self._start(init, options) if init else None
        count, seed = form.whole("count", 1, MOST_DRAWN) or 1, form.whole("seed", 0, 2**31) or 0
        return self.easel.recipe(prompt, entries, count, seed, options, start, sweep)

    def _start(self, given: str, options: dict[str, Any]) -> str:
        """Keeps a picture to start from, cut to the size that is drawn; returns its file."""
        native = self.easel.base.model.picture_side
        width, height = options["width"] or native, options["height"] or native
        draft = self.drafts.get(given)
        if draft is None or not draft.folder.is_dir():
            raise InputError("the picture to start from is not here any more: give it again")
        (file,) = sorted(draft.folder.glob("picture_*"))[:1]
        picture = ImageOps.fit(open_picture(epath.Path(file)).convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
        kept = self.runs / STUDIO / "starts" / f"{hashlib.sha256(pixels.tobytes()).hexdigest()[:16]}.png"
        write_picture(kept, pixels)
        return str(kept)

    def draw(self, form: Form) -> Iterator[dict[str, Any]]:
        """Draws what a form asks for: first the command that draws the same, then picture by picture.

        `view` names the part of the page that shows it: what it asks for later takes the place of what it asked before.
        """
        recipe = self.recipe(form)
        view, own = form.text("view"), object()
        if len(self._newest) > MOST_VIEWS:
            self._newest.clear()
        self._newest[view] = own
        left_out = without_syntax(form.text("prompt"))[1] + without_syntax(form.text("negative_prompt"))[1]
        warning = f"{', '.join(left_out)}: of other programs, and does nothing here" if left_out else ""
        yield {"command": command_of(recipe, "picture.png"), "sweep": bool(recipe.sweep), "warning": warning}
        for picture in self.easel.draw(recipe, lambda: not view or self._newest.get(view) is own):
            words = [word._asdict() for word in picture.words]
            height, width = picture.pixels.shape[:2]
            yield {"file": picture.file.name, "label": picture.label, "width": width, "height": height, "words": words}

    def drawing(self, name: str) -> Path:
        """The file of an earlier drawing.

        Raises:
            InputError: there is none of that name.
        """
        for file in (self.runs / DRAWINGS).glob("*.png"):
            if file.name == name:
                return file
        raise InputError(f"{name}: no such drawing")

    def restore(self, file: Path, name: str) -> dict[str, Any]:
        """The form that draws a picture again; `name` is what the person calls it.

        Raises:
            InputError: the picture does not say how it was drawn, or it cannot be drawn here.
        """
        if ending_of(file, name) != ".png":
            raise InputError(f"{name}: not a PNG, as perfusion_jax writes them")
        try:
            recipe = read_recipe(file)
        except InputError as error:
            raise InputError(str(error).replace(str(file), name)) from error
        try:
            return self._form_of(recipe)
        except InputError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # JSON of another form
            raise InputError("what the picture says of how it was drawn cannot be read") from error

    def _form_of(self, recipe: Recipe) -> dict[str, Any]:
        ours = self.easel.source["source"]
        if recipe.base != self.easel.source:
            raise InputError(f"drawn on the base model {recipe.base['source']}; this studio draws on {ours}")
        if recipe.tree:
            raise InputError("drawn with an exported tree, which perfusion_jax.sample does and the studio does not")
        entries = entries_of(recipe, self._drawable())
        options, prompt = recipe.options, recipe.prompts[0]
        notes = []
        if recipe.init_image:
            notes.append("it began from a picture, which has to be given again")
        if recipe.sweep:
            notes.append("it is of a sweep, which has to be set again")
        if len(set(recipe.prompts)) > 1:
            notes.append("it has other prompts, too, and the page draws one at a time")
        concepts: dict[str, dict[str, float]] = {}
        for number, (entry, each) in enumerate(zip(entries, recipe.concepts, strict=True)):
            prompt = prompt.replace(f"<{each['name']}>", f"<{entry.call}>")
            given = {name: options[name] for name in CONTROLS if options[name] is not None}
            lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
            concepts[entry.call] = {
                name: float(values[number if len(values) > 1 else 0]) for name, values in lists.items()
            }
        names = ("guidance", "guidance_rescale", "sampler", "steps", "spacing", "lock", "width", "height")
        return {
            "prompt": escaped(prompt),
            "count": recipe.prompts.count(recipe.prompts[0]),
            "seed": recipe.seeds[0],
            **{name: options[name] for name in names},
            "negative_prompt": None if options["negative_prompt"] is None else escaped(options["negative_prompt"]),
            "init_strength": options["init_strength"],
            "concepts": concepts,
            "note": "; ".join(notes),
        }

    # The library.

    def rename(self, key: str, name: str) -> str:
        """Gives a concept another name; returns its key now."""
        entry = find_entry(self.runs, key)
        if check_name(name) in RESERVED:
            raise InputError(f"the name {name!r} is one of the studio's own folders: take another")
        renamed = rename(entry, name)
        self.jobs.forget_ended(entry.workdir.name)  # whose command has the old name
        return renamed

    def delete(self, key: str) -> None:
        """Deletes a concept."""
        entry = find_entry(self.runs, key)
        delete(entry)
        self.jobs.forget_ended(entry.workdir.name)

    def export(self, key: str, kind: str) -> dict[str, Any]:
        """Writes a concept for other tools; returns the folder, and the files in it that can be fetched."""
        entry = find_entry(self.runs, key)
        if kind not in KINDS:
            raise InputError(f"{kind}: no kind of export")
        base = self.easel.base
        folder = self.runs / EXPORTS / entry.call / kind
        written = export(base, [load_concept(entry.file, base)], kind, folder)
        files = [file.name for file in written if file.is_file()]
        return {"folder": str(folder), "call": entry.call, "files": files}

    def exported(self, call: str, kind: str, name: str) -> Path:
        """A file that was exported.

        Raises:
            InputError: there is none of that name.
        """
        for file in (self.runs / EXPORTS).glob("*/*/*"):
            if file.is_file() and (file.parts[-3], file.parts[-2], file.name) == (call, kind, name):
                return file
        raise InputError(f"{name}: no such export")

    def close(self) -> None:
        """Saves what is being learnt, and lets go of what was dropped and not learnt."""
        self.jobs.close()
        for draft in self.drafts.values():
            shutil.rmtree(draft.folder, ignore_errors=True)


def _controls(forms: Form, entries: Sequence[Entry]) -> dict[str, list[float]]:
    """The values of all controls, of concepts in the order in which the prompt names them."""
    if not entries:
        return {}
    gated = any(entry.card.method == PERFUSION for entry in entries)
    found: dict[str, list[float]] = {name: [] for name in (CONTROLS if gated else ("strength",))}
    for entry in entries:
        form, card = forms.part(entry.call), entry.card
        default = {"bias": card.bias, "temperature": card.temperature, "strength": 1.0, "start": 0.0, "end": 1.0}
        bounds = {"bias": (-10, 10), "temperature": (1e-3, 100), "strength": (-10, 10), "start": (0, 1), "end": (0, 1)}
        for name, values in found.items():
            given = form.number(name, *bounds[name])
            values.append(default[name] if given is None else given)
    return found


def _sweep(form: Form, control: str) -> tuple[str, list[float]]:
    if control not in (*CONTROLS, "guidance"):
        raise InputError(f"{control}: sweeps one of {', '.join((*CONTROLS, 'guidance'))}")
    first, last, count = form.number("first", -100, 100), form.number("last", -100, 100), form.whole("count", 2, 16)
    if first is None or last is None or count is None:
        raise InputError("a sweep has 2 to 16 pictures, from one number to another")
    return control, np.linspace(first, last, count).round(6).tolist()


def _in_their_words(message: str, draft: Draft) -> str:
    """A message with the person's own names of the pictures in it."""
    for file, name in zip(sorted(draft.folder.glob("picture_*")), draft.names, strict=True):
        message = message.replace(str(file), name).replace(file.name, name)
    return message.replace(str(draft.folder), "the pictures")


def _latest_grid(workdir: Path) -> Path | None:
    return max((workdir / "samples").rglob("*.png"), key=lambda file: file.stat().st_mtime_ns, default=None)
