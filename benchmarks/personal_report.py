"""The table of `benchmarks/personal.py`, and the options that its folder was made with."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perfusion_jax.evaluation.statistics import estimate

SHARES = ("individual", "category", "place")
"""Questions whose answer is right or wrong for each picture."""

SIMILARITY = "image similarity"


def keep_options(file: Path, options: dict[str, Any]) -> None:
    """Writes the options beside what is made with them.

    Raises:
        ValueError: the file tells others: what is there already was made with those.
    """
    if not file.exists():
        file.write_text(json.dumps(options, indent=2) + "\n")
        return
    before = json.loads(file.read_text())
    other = [f"--{name}={before.get(name)}" for name, value in options.items() if before.get(name) != value]
    if other:
        raise ValueError(f"{file}: this folder was made with {' '.join(other)}; take another --out, or the same flags")


def read_lines(file: Path) -> dict[str, dict[str, Any]]:
    """The scores that are there already, by name; a line that a kill has cut is left out."""
    texts = file.read_text().splitlines(keepends=True) if file.exists() else []
    lines = [json.loads(text) for text in texts if text.endswith("\n")]
    return {line["name"]: line for line in lines}


def not_learnt(line: dict[str, Any]) -> dict[str, Any]:
    """The line of a thing that no concept came of: wrong in all its pictures. Takes one that has the ceiling alone."""
    return {**line, "drawn": dict.fromkeys(line["rendered"], 0.0), "learnt": False}


def table_of(lines: Sequence[dict[str, Any]], options: dict[str, Any]) -> str:
    """Rows by vendor, by core kinds and others, and of all: mean (interval) of things, and the ceiling beside it."""
    measures = [measure for measure in (*SHARES, SIMILARITY) if measure in lines[0]["rendered"]]
    groups = {vendor: [line for line in lines if line["vendor"] == vendor] for vendor in _vendors(lines)}
    groups["core kinds"] = [line for line in lines if line["core"]]
    groups["other kinds"] = [line for line in lines if not line["core"]]
    groups["all"] = list(lines)
    titles = [f"{measure}, %" if measure in SHARES else measure for measure in measures]
    rows = [
        f"| | things | {' | '.join(f'{title}: drawn (95 %) / rendered' for title in titles)} |",
        f"| {' | '.join(['---'] * (2 + len(measures)))} |",
    ]
    for name, group in groups.items():
        if group:
            rows.append(f"| {name} | {len(group)} | {' | '.join(_cell(group, measure) for measure in measures)} |")
    missing = [line["name"] for line in lines if not line.get("learnt", True)]
    if missing:
        rows += ["", f"Not learnt, and counted as wrong in all pictures: {', '.join(missing)}."]
    rows += ["", f"Made with `{' '.join(f'--{name}={value}' for name, value in options.items())}`."]
    return "\n".join(rows) + "\n"


def _vendors(lines: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({line["vendor"] for line in lines})


def _cell(group: Sequence[dict[str, Any]], measure: str) -> str:
    """Mean and interval of what was drawn, and the mean of what was rendered."""
    drawn, rendered = (estimate([line[key][measure] for line in group]) for key in ("drawn", "rendered"))
    scale, digits = (100, 0) if measure in SHARES else (1, 2)
    mean, low, high, ceiling = (f"{scale * value:.{digits}f}" for value in (*drawn, rendered.mean))
    return f"{mean} / {ceiling}" if math.isnan(drawn.low) else f"{mean} ({low}-{high}) / {ceiling}"
