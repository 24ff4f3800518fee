"""The report of an evaluation: report.json, and report.html with the same numbers, plots and pictures."""

import html
import io
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from perfusion_jax.evaluation.scores import Setting, file_name
from perfusion_jax.evaluation.statistics import Estimate, dominated_area, estimate
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import write_bytes

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


class Summary(NamedTuple):
    """What a report says in numbers.

    Attributes:
        settings: by label, the estimate of each of MEASURES over concepts.
        concepts: by label and name, each concept's means.
        area: that the front of the settings dominates, text against image similarity, from 0; None of a single setting.
    """

    settings: dict[str, dict[str, Estimate]]
    concepts: dict[str, dict[str, dict[str, float]]]
    area: float | None

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON."""
        settings = {
            label: {measure: each._asdict() for measure, each in row.items()} for label, row in self.settings.items()
        }
        return {"settings": settings, "concepts": self.concepts, "dominated_area": self.area}


def summarise(lines: Sequence[Mapping[str, Any]]) -> Summary:
    """Means of each concept, and over concepts.

    Args:
        lines: of `scores.jsonl`, at least one.
    """
    concepts: dict[str, dict[str, dict[str, float]]] = {}
    for line in lines:
        means = {measure: float(np.mean(line[measure])) for measure in MEASURES}
        concepts.setdefault(line["setting"], {})[line["name"]] = means
    settings = {
        label: {measure: estimate([means[measure] for means in rows.values()]) for measure in MEASURES}
        for label, rows in concepts.items()
    }
    points = [(row["text"].mean, row["image"].mean) for row in settings.values()]
    return Summary(settings, concepts, dominated_area(points, (0, 0)) if len(points) > 1 else None)


def write_report(out: epath.Path, lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> epath.Path:
    """Writes report.json and report.html.

    Args:
        out: the evaluation's folder.
        lines: of `scores.jsonl`.
        facts: what was evaluated and how, for readers.

    Returns:
        The HTML file.

    Raises:
        InputError: the files cannot be written.
        UnavailableError: storage fails.
    """
    summary = summarise(lines)
    write_bytes(out / "report.json", json.dumps({"facts": facts, **summary.as_json()}, indent=2).encode())
    plot = _front(summary) if len(summary.settings) > 1 else ""
    file = out / "report.html"
    write_bytes(file, _page(summary, facts, plot).encode())
    return file


def _page(summary: Summary, facts: Mapping[str, Any], plot: str) -> str:
    names = list(dict.fromkeys(name for rows in summary.concepts.values() for name in rows))
    parts = ["<h1>Evaluation</h1>", f"<p>{html.escape(_opening(names, facts))}</p>", _table(summary)]
    if plot:
        parts.append(f'<div class="plot">{plot}</div>')
        parts.append(f"<p>Area that the front dominates, from 0: {summary.area:.3f}</p>")
    parts.append("<h2>Concept by concept</h2>")
    for name in names:
        parts.append(f"<h3>{html.escape(name)}</h3><small>its own pictures</small>")
        parts.append(_picture(name, "own", f"pictures of {name}"))
        for label, rows in summary.concepts.items():
            if name in rows:
                scores = ", ".join(f"{words} {rows[name][key]:.3f}" for key, words in MEASURES.items())
                parts.append(f"<small>{html.escape(label)}: {scores}</small>")
                parts.append(_picture(name, file_name(Setting(label, {})), f"{name}, {label}"))
    parts += ["<h2>How it was drawn</h2>", _facts(facts)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Evaluation</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _opening(names: Sequence[str], facts: Mapping[str, Any]) -> str:
    prompts = len(facts["prompts"])
    kept = "The more a picture shows the concept's own, the less it may follow its prompt: both are to be high."
    return f"{', '.join(names)} on {facts['base model']}, by {prompts} prompts that training never saw. {kept}"


def _facts(facts: Mapping[str, Any]) -> str:
    """A table, lists with an entry on each line."""
    rows = ""
    for name, value in facts.items():
        entries = value if isinstance(value, list) else [value]
        rows += (
            f"<tr><td>{html.escape(name)}</td><td>{'<br>'.join(html.escape(str(each)) for each in entries)}</td></tr>"
        )
    return f'<table class="facts">{rows}</table>'


def _table(summary: Summary) -> str:
    heads = "".join(f"<th>{words}</th>" for words in MEASURES.values())
    rows = ""
    for label, row in summary.settings.items():
        cells = "".join(
            f"<td>{row[measure].mean:.3f} <small>{row[measure].low:.3f}-{row[measure].high:.3f}</small></td>"
            for measure in MEASURES
        )
        rows += f"<tr><td>{html.escape(label)}</td>{cells}</tr>"
    count = max(map(len, summary.concepts.values()))
    return (
        f'<div class="wide"><table><tr><th>setting</th>{heads}</tr>{rows}</table></div>'
        f"<p><small>Means over {count} concepts, with bootstrap intervals of 95&nbsp;% over concepts.</small></p>"
    )


def _picture(name: str, file: str, words: str) -> str:
    return f'<img loading="lazy" src="pictures/{html.escape(name)}/{html.escape(file)}.png" alt="{html.escape(words)}">'


def check_plots() -> None:
    """Sees that plots can be made, before anything is drawn.

    Raises:
        InputError: matplotlib is not there.
    """
    if find_spec("matplotlib") is None:
        raise InputError("the plot of a sweep needs matplotlib: pip install matplotlib")


def _front(summary: Summary) -> str:
    """Text against image similarity of all settings, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    # The same numbers are the same file.
    with matplotlib.rc_context({"svg.hashsalt": "perfusion_jax", "svg.fonttype": "path"}):
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        axes = figure.subplots()
        text, image = ([row[key] for row in summary.settings.values()] for key in ("text", "image"))
        axes.errorbar(
            [each.mean for each in text],
            [each.mean for each in image],
            xerr=np.transpose([(each.mean - each.low, each.high - each.mean) for each in text]),
            yerr=np.transpose([(each.mean - each.low, each.high - each.mean) for each in image]),
            fmt="o-",
            capsize=2,
            linewidth=1,
        )
        for label, x, y in zip(summary.settings, text, image, strict=True):
            axes.annotate(label, (x.mean, y.mean), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axes.set(xlabel=MEASURES["text"], ylabel=MEASURES["image"])
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]
