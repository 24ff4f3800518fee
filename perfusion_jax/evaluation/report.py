"""The report of an evaluation: report.json, and report.html, one file with the same numbers, plots and pictures."""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from perfusion_jax.evaluation.scores import Setting, file_name
from perfusion_jax.evaluation.statistics import LEAST, Estimate, area, area_difference, estimate
from perfusion_jax.evaluation.subjects import ALL, Subject
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import write_bytes

MOST_EMBEDDED = 200
"""Sheets that are put into the page; more are left beside it."""

MEASURES = {"image": "image similarity", "text": "text similarity", "precision": "prompt precision"}

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
small { color: #888; }
.facts td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
img { max-width: 100%; display: block; margin: .3rem 0 1rem; }
.wide { overflow-x: auto; }
.plot { background: #fff; border-radius: .3rem; max-width: 36rem; }
.plot svg { width: 100%; height: auto; display: block; }
"""


class Front(NamedTuple):
    """What a report says in numbers of one label.

    Attributes:
        settings: by setting, the estimate of each of MEASURES over concepts.
        concepts: by setting and name, each concept's means, over all its runs.
        area: that the front of the settings dominates, text against image similarity, from 0; None of a single setting
            where there is nothing to compare with.
        lead: how much larger the area is than the first label's, over the concepts of both; None for the first.
    """

    settings: dict[str, dict[str, Estimate]]
    concepts: dict[str, dict[str, dict[str, float]]]
    area: Estimate | None
    lead: Estimate | None

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return {
            "settings": {
                label: {key: _as_json(each) for key, each in row.items()} for label, row in self.settings.items()
            },
            "concepts": self.concepts,
            "dominated_area": self.area and _as_json(self.area),
            "lead": self.lead and _as_json(self.lead),
        }


def _as_json(number: Estimate) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in number._asdict().items()}


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, Front]:
    """Means of each concept, and over concepts, by label.

    Args:
        lines: of `scores/`, at least one.
    """
    found: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    for line in lines:
        means = {measure: float(np.mean(line[measure])) for measure in MEASURES}
        found.setdefault(line["label"], {}).setdefault(line["setting"], {}).setdefault(line["name"], []).append(means)
    fronts: dict[str, Front] = {}
    for label, by_setting in found.items():
        concepts = {
            setting: {
                name: {measure: float(np.mean([run[measure] for run in runs])) for measure in MEASURES}
                for name, runs in rows.items()
            }
            for setting, rows in by_setting.items()
        }
        settings = {
            setting: {measure: estimate([means[measure] for means in rows.values()]) for measure in MEASURES}
            for setting, rows in concepts.items()
        }
        whole = sorted(set.intersection(*(set(rows) for rows in concepts.values())))
        compared = bool(whole) and (len(concepts) > 1 or len(found) > 1)
        fronts[label] = Front(settings, concepts, area(points(concepts, whole)) if compared else None, None)
    first, *others = fronts.items()
    for label, front in others:
        both = set.intersection(*(set(rows) for one in (first[1], front) for rows in one.concepts.values()))
        if first[1].area and front.area and both:
            names = sorted(both)
            lead = area_difference(points(front.concepts, names), points(first[1].concepts, names))
            fronts[label] = front._replace(lead=lead)
    return fronts


def points(concepts: Mapping[str, Mapping[str, Mapping[str, float]]], names: Iterable[str]) -> np.ndarray:
    """Text and image similarity, float64 [concepts, settings, 2]."""
    return np.array(
        [[(rows[name]["text"], rows[name]["image"]) for rows in concepts.values()] for name in sorted(names)]
    )


def write_report(
    out: epath.Path, subjects: Sequence[Subject], lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> epath.Path:
    """Writes report.json and report.html.

    Args:
        out: the evaluation's folder.
        subjects: what was evaluated.
        lines: of `scores/`, those of all subjects.
        facts: what was evaluated and how, for readers.

    Returns:
        The HTML file.

    Raises:
        InputError: the files cannot be written.
        UnavailableError: storage fails.
    """
    fronts = summarise(lines)
    numbers = {label: front.as_json() for label, front in fronts.items()}
    write_bytes(out / "report.json", json.dumps({"facts": facts, "fronts": numbers}, indent=2).encode())
    plot = front_plot(fronts) if any(front.area for front in fronts.values()) else ""
    file = out / "report.html"
    write_bytes(file, _page(out, subjects, fronts, facts, plot).encode())
    return file


def _page(
    out: epath.Path, subjects: Sequence[Subject], fronts: Mapping[str, Front], facts: Mapping[str, Any], plot: str
) -> str:
    names = list(dict.fromkeys(subject.name for subject in subjects))
    parts = ["<h1>Evaluation</h1>", f"<p>{html.escape(_opening(names, facts))}</p>", _table(fronts)]
    if plot:
        parts += [f'<div class="plot">{plot}</div>', _areas(fronts)]
    parts.append("<h2>Concept by concept</h2>")
    sheets = len(names) + sum(len(fronts[subject.label].settings) for subject in subjects)
    source = _embedded if sheets <= MOST_EMBEDDED else _linked
    for name in names:
        parts.append(f"<h3>{html.escape(name)}</h3><small>its own pictures</small>")
        runs = [subject for subject in subjects if subject.name == name]
        parts.append(_picture(source(out, runs[0], "own"), f"pictures of {name}"))
        for label, front in fronts.items():
            for setting, rows in front.concepts.items():
                if name in rows:
                    scores = ", ".join(f"{words} {rows[name][key]:.3f}" for key, words in MEASURES.items())
                    parts.append(f"<small>{html.escape(_named(label, setting))}: {scores}</small>")
                    file = file_name(Setting(setting, {}))
                    own = [subject for subject in runs if subject.label == label]
                    parts += [_picture(source(out, run, file), f"{name}, {_named(run.run, setting)}") for run in own]
    parts += ["<h2>How it was drawn</h2>", _facts(facts)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Evaluation</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _named(run: str, setting: str) -> str:
    return setting if run == ALL else f"{run}, {setting}"


def _opening(names: Sequence[str], facts: Mapping[str, Any]) -> str:
    prompts = len(facts["prompts"])
    kept = "The more a picture shows the concept's own, the less it may follow its prompt: both are to be high."
    return (
        f"{', '.join(names)} on {facts['base model']}, by {prompts} prompts that training does not learn from. {kept}"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    """A table, lists with an entry on each line."""
    rows = ""
    for name, value in facts.items():
        entries = value if isinstance(value, list) else [value]
        rows += (
            f"<tr><td>{html.escape(name)}</td><td>{'<br>'.join(html.escape(str(each)) for each in entries)}</td></tr>"
        )
    return f'<table class="facts">{rows}</table>'


def _table(fronts: Mapping[str, Front]) -> str:
    heads = "".join(f"<th>{words}</th>" for words in MEASURES.values())
    rows = ""
    for label, front in fronts.items():
        for setting, row in front.settings.items():
            cells = "".join(f"<td>{_written(row[measure])}</td>" for measure in MEASURES)
            rows += f"<tr><td>{html.escape(_named(label, setting))}</td>{cells}</tr>"
    count = max(len(rows) for front in fronts.values() for rows in front.concepts.values())
    enough = "with bootstrap intervals of 95&nbsp;%" if count >= LEAST else f"of fewer than {LEAST} no intervals"
    return (
        f'<div class="wide"><table><tr><th>setting</th>{heads}</tr>{rows}</table></div>'
        f"<p><small>Means over {count} concept{'s' * (count > 1)}; {enough}.</small></p>"
    )


def _areas(fronts: Mapping[str, Front]) -> str:
    """A table of what each front dominates."""
    first = next(iter(fronts))
    rows = ""
    for label, front in fronts.items():
        if front.area:
            lead = _written(front.lead, "+.3f") if front.lead else ""
            rows += f"<tr><td>{html.escape(label)}</td><td>{_written(front.area)}</td><td>{lead}</td></tr>"
    return (
        f"<table><tr><th>front</th><th>area it dominates, from 0</th><th>more than {html.escape(first)}</th></tr>"
        f"{rows}</table>"
    )


def _written(number: Estimate, form: str = ".3f") -> str:
    if np.isnan(number.low):
        return f"{number.mean:{form}}"
    return f"{number.mean:{form}} <small>{number.low:{form}} to {number.high:{form}}</small>"


def _linked(out: epath.Path, subject: Subject, file: str) -> str:
    """The address of a sheet, beside the page."""
    return f"pictures/{subject.folder}/{file}.png"


def _embedded(out: epath.Path, subject: Subject, file: str) -> str:
    """A sheet within the page, a tenth of its size as a PNG; its address where it is gone, or too large for WebP."""
    stored, stream = out / _linked(out, subject, file), io.BytesIO()
    try:
        with Image.open(io.BytesIO(stored.read_bytes())) as picture:
            picture.save(stream, "webp", quality=85)
    except (OSError, ValueError):
        return _linked(out, subject, file)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _picture(source: str, words: str) -> str:
    return f'<img loading="lazy" src="{html.escape(source)}" alt="{html.escape(words)}">'


def check_plots() -> None:
    """Sees that plots can be made, before anything is drawn.

    Raises:
        InputError: matplotlib is not there.
    """
    if find_spec("matplotlib") is None:
        raise InputError("the plot of a sweep needs matplotlib: pip install matplotlib")


def front_plot(fronts: Mapping[str, Front]) -> str:
    """Text against image similarity of all settings, as SVG.

    Raises:
        InputError: matplotlib is not there.
    """
    check_plots()
    import matplotlib
    from matplotlib.figure import Figure

    # The same numbers are the same file.
    with matplotlib.rc_context({"svg.hashsalt": "perfusion_jax", "svg.fonttype": "path"}):
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        axes = figure.subplots()
        for label, front in fronts.items():
            text, image = ([row[key] for row in front.settings.values()] for key in ("text", "image"))
            axes.errorbar(
                [each.mean for each in text],
                [each.mean for each in image],
                xerr=np.transpose([(each.mean - each.low, each.high - each.mean) for each in text]),
                yerr=np.transpose([(each.mean - each.low, each.high - each.mean) for each in image]),
                fmt="o-",
                capsize=2,
                linewidth=1,
                label=label,
            )
            for setting, x, y in zip(front.settings, text, image, strict=True):
                axes.annotate(setting, (x.mean, y.mean), textcoords="offset points", xytext=(5, 5), fontsize=8)
        if len(fronts) > 1:
            axes.legend()
        axes.set(xlabel=MEASURES["text"], ylabel=MEASURES["image"])
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]
