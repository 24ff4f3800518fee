"""The studio: what the page asks for, as methods that take and give plain JSON.

Every one of them calls what the commands call. What is wrong with what a person sent is an InputError.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from perfusion_jax.config import to_json
from perfusion_jax.data.pictures import open_picture
from perfusion_jax.drawing.controls import SLOTS
from perfusion_jax.drawing.prompts import escaped, foreign
from perfusion_jax.drawing.recipe import CONTROLS, Recipe, command_of, few_steps, read_recipe, sweep_over, unnamed
from perfusion_jax.formats.concept_file import PERFUSION, load_concept
from perfusion_jax.formats.exporting import KINDS, export
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.workdir import CONFIG, EXPORTS, SAMPLES
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.names import SAMPLERS, SPACINGS, STUDIO
from perfusion_jax.web import jobs as queue
from perfusion_jax.web.easel import DRAWINGS, Easel, entries_of
from perfusion_jax.web.faults import for_page
from perfusion_jax.web.forms import Form, thing_config
from perfusion_jax.web.intake import SHOWN_SIDE, Preview, folder_for, head_of, keep, new_draft, preview, take_back
from perfusion_jax.web.jobs import DONE, LEARNING, Job, Jobs
from perfusion_jax.web.library import (
    PICTURES,
    Entry,
    check_name,
    delete,
    doomed_run,
    doomed_with,
    find_entries,
    find_entry,
    named_in,
    rename,
)

RESERVED = (EXPORTS, DRAWINGS, PICTURES)
"""Folders among the runs that are no runs."""

MOST_DRAWN = 64  # pictures of one request
SHOWN_BEFORE = 48  # earlier drawings
MOST_VIEWS = 1000
MOST_SIDE = 2048  # pixels of config.size, in which pictures are looked at


@dataclass
class Draft:
    """Pictures that a person has dropped, before they are learnt.

    Attributes:
        folder: where they lie.
        names: what the person called them.
        view: the part of the page that dropped them; what it drops next takes their place.
        looked: the config, as JSON, by which all of them were found to be learnable.
    """

    folder: Path
    names: tuple[str, ...]
    view: str = ""
    looked: str = ""


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
    _looking: threading.Lock = field(default_factory=threading.Lock)  # all pictures of a draft are in memory then

    @classmethod
    def open(cls, runs: Path, base: dict[str, str | None]) -> "Studio":
        """The studio of a folder; what waits in its queue is begun.

        Args:
            runs: the folder; it is made.
            base: keyword arguments of `load_base_model`.
        """
        runs = runs.resolve()
        runs.mkdir(parents=True, exist_ok=True)
        for place in ("uploads", "drafts", "trash"):
            for left in (runs / STUDIO / place).glob("*"):  # by a studio that was killed
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        studio = cls(runs, Easel(runs, base), Jobs(runs))
        studio.jobs.start()
        return studio

    def state(self) -> dict[str, Any]:
        """All that changes by itself: the library, the queue, and earlier drawings."""
        self.easel.load()
        entries, jobs = find_entries(self.runs), self.jobs.snapshot()
        return {
            "base": self.easel.source["source"],
            "sampler": self.easel.quick_sampler,
            "loading": not self.easel.is_loaded and not self.easel.failure,
            "problem": self.easel.failure,
            "entries": [self._entry(entry) for entry in entries],
            "jobs": [self._job(job, entries) for job in jobs],
            "interrupted": self.jobs.interrupted(),
            "drawings": [{"name": file.name, "at": written(file)} for file in self.easel.drawn_before(SHOWN_BEFORE)],
        }

    def _entry(self, entry: Entry) -> dict[str, Any]:
        card = entry.card
        obstacle = self.easel.obstacle(entry)
        return {
            "key": entry.key,
            "call": entry.call,
            "name": card.name,
            "kind": card.super_category,
            "phrase": card.phrase.replace(card.placeholder, f"<{entry.call}>"),
            "drawable": not obstacle,
            "obstacle": obstacle,
            "gated": card.method == PERFUSION,
            "bias": card.bias,
            "temperature": card.temperature,
            "grid": written(entry.grid) if entry.grid else "",
            "facts": {
                "in prompts": f"<{entry.call}>",
                "kind": card.super_category,
                "learnt by": card.method,
                "step": f"{card.step:,}",
                **{name.replace("_", " "): f"{value:.3f}" for name, value in entry.scores.items()},
                "bias": f"{card.bias:g}",
                "temperature": f"{card.temperature:g}",
                "base model": card.base_model,
                "licence": card.licence or "not said",
                "file": str(entry.file),
            },
        }

    def _job(self, job: Job, entries: Sequence[Entry]) -> dict[str, Any]:
        learning = job.state == LEARNING
        progress = self.jobs.progress() if learning else None
        warnings = dict.fromkeys(self.jobs.warnings) if learning else job.warnings
        grid = _latest_grid(self.runs / job.run) if job.state in (LEARNING, DONE) else None
        learnt = [entry for entry in entries if entry.workdir.name == job.run] if job.state == DONE else []
        return {
            "run": job.run,
            "things": [f"{name}, a {kind}" if kind else name for name, kind in zip(job.names, job.kinds, strict=True)],
            "state": job.state,
            "stopping": learning and self.jobs.is_stopping,
            "error": for_page(job.error),
            "warnings": [for_page(warning) for warning in warnings],
            "command": queue.command_of(job, self.runs),
            "progress": progress._asdict() if progress else None,
            "grid": written(grid) if grid else "",
            "learnt": [entry.key for entry in learnt],
        }

    def grid_of(self, key: str) -> Path:
        """The pictures by which a concept of the library was scored.

        Raises:
            InputError: there are none.
        """
        grid = find_entry(self.runs, key).grid
        if grid is None:
            raise InputError("there are no pictures of it yet")
        return grid

    def grid_of_run(self, run: str) -> Path:
        """The latest pictures of a run of the queue.

        Raises:
            InputError: there are none.
        """
        known = [job.run for job in self.jobs.snapshot() if job.run == run]
        grid = _latest_grid(self.runs / known[0]) if known else None
        if grid is None:
            raise InputError("there are no pictures of it yet")
        return grid

    # Learning.

    def drop(self, files: Sequence[Path], names: Sequence[str], view: str = "") -> dict[str, Any]:
        """Takes pictures in.

        Args:
            files: as they were uploaded.
            names: as the person calls them.
            view: the part of the page that sends them; what it sent before is let go of.
        """
        folder = new_draft(self.runs, files, names)
        for name, old in list(self.drafts.items()):
            if (view and old.view == view[:100]) or not old.folder.is_dir():
                self.drafts.pop(name, None)
                shutil.rmtree(old.folder, ignore_errors=True)
        self.drafts[folder.name] = Draft(folder, tuple(names), view[:100])
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
        config = self._config(form, form.text("name") or "thing", draft.folder)
        with self._looking:
            try:
                shown = preview(config, self.easel.base, draft.folder, draft.names)
            except InputError as error:
                raise InputError(_in_their_words(str(error), draft)) from error
        draft.looked = to_json(config)
        return self.warning(config.super_category), shown

    def _config(self, form: Form, name: str, pictures: Path) -> ConfigDict:
        """The config of a form, small enough to be looked at."""
        config = thing_config(self.easel.source, form, check_name(name), str(pictures))
        if config.size > MOST_SIDE:
            raise InputError(f"size is {config.size}; on the page it must be at most {MOST_SIDE}")
        return config

    def learn(self, form: Form) -> dict[str, Any]:
        """Puts a draft into the queue, by the name and kind of the form.

        `painted` in the form holds the masks of all its pictures, if one of them was painted. What cannot be learnt is
        refused now, and not when its turn comes.
        """
        name = _new_name(form.text("name"))
        self.jobs.check_free(name)
        draft = self._draft(form)
        files = sorted(draft.folder.glob("picture_*"))
        painted = self._painted(form)
        if painted and len(painted) != len(files):
            raise InputError(f"{len(painted)} masks of {len(files)} pictures were sent")
        if draft.looked != to_json(self._config(form, name, draft.folder)):
            self.look(form)
        with self._starting:
            self.jobs.check_free(name)
            folder = folder_for(self.runs, name)
            config = self._config(form, name, folder)
            if painted:
                config.masks = "files"
            masks = {file.stem: mask for file, mask in zip(files, painted, strict=True)} if painted else {}
            keep(draft.folder, folder, masks, config.crop)
            try:
                self.jobs.add(config)
            except Exception:
                take_back(folder, draft.folder)
                raise
            self.drafts.pop(draft.folder.name, None)
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

    def act(self, act: str, run: str, photographs: bool = False) -> None:
        """Stops a run, lets it go on, takes it out of the queue; takes one that a command began into it, or deletes it;
        or loads the base model again.
        """
        acts: dict[str, Callable[[str], object]] = {
            "stop": self.jobs.stop,
            "go_on": self.jobs.go_on,
            "forget": self.jobs.forget,
            "adopt": self.jobs.adopt,
            "discard": lambda run: self.jobs.discard(run, photographs),
            "load": lambda _: self.easel.load(again=True),
        }
        if act not in acts:
            raise InputError(f"{act}: no such act")
        acts[act](run)

    # Drawing.

    def _drawable(self) -> list[Entry]:
        _ = self.easel.base  # which says why it cannot be loaded
        return [entry for entry in find_entries(self.runs) if not self.easel.obstacle(entry)]

    def _named(self, prompt: str) -> list[Entry]:
        """The concepts that a prompt names.

        Raises:
            InputError: one of them is not in the library, or cannot be drawn here.
        """
        drawable = self._drawable()
        calls = {entry.call for entry in drawable}
        for entry in find_entries(self.runs):
            if entry.call not in calls and f"<{entry.call}>" in prompt:
                raise InputError(f"<{entry.call}> was {self.easel.obstacle(entry)}: start a studio with that one")
        return named_in(prompt, drawable)

    def recipe(self, form: Form, start: Path | None = None) -> Recipe:
        """What a form asks to be drawn, from `start` if that is a picture."""
        prompt = form.text("prompt")
        if not prompt:
            raise InputError("the prompt is empty: say what to draw, such as a photo of a <dog> on the beach")
        entries = self._named(prompt)
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
        count, seed = form.whole("count", 1, MOST_DRAWN) or 1, form.whole("seed", 0, 2**31) or 0
        sweep = _sweep(form.part("sweep"), entries)
        if sweep and count * len(sweep[1]) > MOST_DRAWN:
            raise InputError(f"a sweep of {len(sweep[1])} for {count} pictures: at most {MOST_DRAWN} are drawn at once")
        return self.easel.recipe(prompt, entries, count, seed, options, str(start) if start else None, sweep)

    def _start(self, form: Form) -> tuple[Path | None, bool]:
        """Keeps the picture that a form starts from, cut to the size that is drawn; returns its file, and whether it is
        new.
        """
        given = form.text("init_image")
        if not given:
            return None, False
        native = self.easel.base.model.picture_side
        width, height = form.whole("width", 8, 4096) or native, form.whole("height", 8, 4096) or native
        draft = self.drafts.get(given)
        if draft is None or not draft.folder.is_dir():
            raise InputError("the picture to start from is not here any more: give it again")
        (file,) = sorted(draft.folder.glob("picture_*"))[:1]
        try:
            picture = open_picture(epath.Path(file)).convert("RGB")
        except InputError as error:
            raise InputError(_in_their_words(str(error), draft)) from error
        pixels = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
        kept = self.runs / STUDIO / "starts" / f"{hashlib.sha256(pixels.tobytes()).hexdigest()[:16]}.png"
        new = not kept.exists()
        write_picture(kept, pixels)
        return kept, new

    def draw(self, form: Form, connected: Callable[[], bool] = lambda: True) -> Iterator[dict[str, Any]]:
        """Draws what a form asks for: first the command that draws the same, then picture by picture.

        `view` names the part of the page that shows it: what it asks for later takes the place of what it asked before.

        Args:
            form: what is asked for.
            connected: whether anybody still waits for it.
        """
        view, own = form.text("view"), object()
        if len(self._newest) > MOST_VIEWS:
            self._newest.clear()
        self._newest[view] = own

        def wanted() -> bool:
            return connected() and (not view or self._newest.get(view) is own)

        self.recipe(form)  # what cannot be drawn leaves no picture to start from
        start, new = self._start(form)
        try:
            recipe = self.recipe(form, start)
            yield {
                "command": command_of(recipe, "picture.png"),
                "sweep": bool(recipe.sweep),
                "warnings": self._warnings(form, recipe),
            }
            for picture in self.easel.draw(recipe, wanted):
                words = [word._asdict() for word in picture.words]
                height, width = picture.pixels.shape[:2]
                yield {
                    **{"file": picture.file.name, "at": written(picture.file), "label": picture.label},
                    **{"width": width, "height": height, "words": words},
                }
        except InputError:
            if new and start:  # of what is refused
                start.unlink(missing_ok=True)
            raise

    def _warnings(self, form: Form, recipe: Recipe) -> list[str]:
        found = foreign([form.text("prompt"), form.text("negative_prompt")])
        return [for_page(words) for words in [*found, *few_steps(recipe, self.easel.base), *unnamed(recipe)]]

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
        try:
            if head_of(file, name).ending != ".png" or _is_animated(file):
                raise InputError(f"{name}: not a PNG, as perfusion_jax writes them")
            recipe = read_recipe(file)
        except FileNotFoundError as error:
            raise InputError(f"{name}: it is not there any more") from error
        except InputError as error:
            raise InputError(str(error).replace(str(file), name)) from error
        try:
            form = self._form_of(recipe)
            json.dumps(form, allow_nan=False)
            return form
        except InputError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            # JSON of another form.
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
        name = _new_name(name)
        renamed = rename(entry, name)
        self.jobs.rename(entry.workdir.name, entry.card.name, name)
        return renamed

    def doomed(self, key: str, run: str) -> dict[str, Any]:
        """What goes if a concept, or a run that has not come to its end, is deleted: words for the person."""
        if run:
            self.jobs.check_interrupted(run)
            files, photographs = doomed_run(self.runs / run)
        else:
            files, photographs = doomed_with(find_entry(self.runs, key))
        pictures = len([each for each in photographs.iterdir() if each.is_file()]) if photographs else 0
        return {
            "files": [str(file.relative_to(self.runs)) for file in files],
            "photographs": f"{pictures} in {photographs.relative_to(self.runs)}" if photographs else "",
        }

    def delete(self, key: str, photographs: bool = False) -> None:
        """Deletes a concept, and if that is said, the pictures that it was learnt from."""
        entry = find_entry(self.runs, key)
        whole = any(file.name == CONFIG for file in doomed_with(entry).files)
        delete(entry, photographs)
        if whole or not entry.workdir.exists():
            self.jobs.forget_deleted(entry.workdir.name)

    def export(self, key: str, kind: str) -> dict[str, Any]:
        """Writes a concept for other tools; returns the folder, and the files in it that can be fetched."""
        entry = find_entry(self.runs, key)
        if kind not in KINDS:
            raise InputError(f"{kind}: no kind of export")
        base = self.easel.base
        folder = self.runs / EXPORTS / entry.call / kind
        found = export(base, [load_concept(entry.file, base)], kind, folder)
        files = [file.name for file in found if file.is_file()]
        command = ["python", "-m", "perfusion_jax.export", "--concept", str(entry.file), "--to", kind]
        for flag, name in (("base", "source"), ("revision", "revision"), ("variant", "variant")):
            if (value := self.easel.source[name]) and value != "emoji":
                command += [f"--{flag}", value]
        command += ["--out", str(folder)]
        return {"folder": str(folder), "call": entry.call, "files": files, "command": command}

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
        if gated and found["start"][-1] > found["end"][-1]:
            raise InputError(
                f"<{entry.call}> acts from {found['start'][-1]:g} to {found['end'][-1]:g}: begin before it ends"
            )
    return found


def _sweep(form: Form, entries: Sequence[Entry]) -> tuple[str, list[float]] | None:
    """What a form sweeps, if it does."""
    control = form.text("control")
    if not control:
        return None
    first, last, count = form.number("first", -100, 100), form.number("last", -100, 100), form.whole("count", 2, 16)
    if first is None or last is None or count is None:
        raise InputError("a sweep has 2 to 16 pictures, from one number to another")
    sweep = sweep_over(control, first, last, count)
    gated = any(entry.card.method == PERFUSION for entry in entries)
    if control != "guidance" and not (gated or (entries and control == "strength")):
        raise InputError(f"{control} changes nothing here: name a concept in the prompt that has it, such as <name>")
    return sweep


def _new_name(given: str) -> str:
    """A name for a concept that no folder of the studio's has; some file systems take Pictures for pictures."""
    name = check_name(given)
    if name.casefold() in RESERVED:
        raise InputError(f"the name {name!r} is one of the studio's own folders: take another")
    return name


def _is_animated(file: Path) -> bool:
    with Image.open(file, formats=["PNG"]) as image:
        return getattr(image, "is_animated", False)


def written(file: Path) -> str:
    """When a file was written, in nanoseconds; empty if it is not there any more."""
    try:
        return str(file.stat().st_mtime_ns)
    except OSError:
        return ""


def _in_their_words(message: str, draft: Draft) -> str:
    """A message with the person's own names of the pictures in it."""
    for file, name in zip(sorted(draft.folder.glob("picture_*")), draft.names, strict=True):
        message = message.replace(str(file), name).replace(file.name, name)
    return message.replace(str(draft.folder), "the pictures")


def _latest_grid(workdir: Path) -> Path | None:
    return max((workdir / SAMPLES).rglob("*.png"), key=lambda file: int(written(file) or 0), default=None)
