"""The table of benchmarks/personal.py: what is counted, what is kept, what is refused."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from personal_report import SHARES, SIMILARITY, keep_options, not_learnt, read_lines, table_of

OPTIONS = {"seed": 0, "base": "emoji"}


def line_of(number, drawn, core=True):
    return {
        "name": f"thing-{number}",
        "vendor": "flat" if number % 2 else "solid",
        "core": core,
        "rendered": {**dict.fromkeys(SHARES, 1.0), SIMILARITY: 0.9},
        "drawn": {**dict.fromkeys(SHARES, drawn), SIMILARITY: drawn / 2},
    }


def test_rows_are_by_vendor_and_by_core_with_the_ceiling_beside():
    lines = [line_of(number, 0.5 + 0.25 * (number % 3), core=number < 5) for number in range(12)]
    rows = {row.split("|")[1].strip(): row for row in table_of(lines, OPTIONS).splitlines() if row.startswith("|")}
    assert set(rows) == {"", "---", "flat", "solid", "core kinds", "other kinds", "all"}
    assert rows["all"].split("|")[2].strip() == "12"
    assert rows["core kinds"].split("|")[2].strip() == "5"
    mean, _, interval = rows["all"].split("|")[3].strip().partition(" ")
    assert mean == "75"
    assert interval.startswith("(")
    assert interval.endswith("/ 100")
    assert rows["all"].split("|")[6].strip().startswith("0.38 (")
    assert "`--seed=0 --base=emoji`" in table_of(lines, OPTIONS)


def test_what_was_not_learnt_is_wrong_in_all_pictures_and_named():
    ceiling = {name: value for name, value in line_of(0, 1.0).items() if name != "drawn"}
    table = table_of([line_of(1, 1.0), not_learnt(ceiling)], OPTIONS)
    assert "| all | 2 | 50 / 100 |" in table
    assert "Not learnt, and counted as wrong in all pictures: thing-0." in table


def test_without_an_instance_encoder_nothing_is_said_of_individuals():
    lines = [line_of(number, 0.5) for number in range(6)]
    for line in lines:
        for key in ("drawn", "rendered"):
            del line[key]["individual"], line[key][SIMILARITY]
    assert "individual" not in table_of(lines, OPTIONS)


def test_a_folder_made_with_other_flags_is_refused(tmp_path):
    keep_options(tmp_path / "options.json", OPTIONS)
    keep_options(tmp_path / "options.json", OPTIONS)
    with pytest.raises(ValueError, match="--seed=0"):
        keep_options(tmp_path / "options.json", {**OPTIONS, "seed": 1})


def test_a_line_that_a_kill_has_cut_is_not_there(tmp_path):
    file = tmp_path / "scores.jsonl"
    assert read_lines(file) == {}
    file.write_text('{"name": "one"}\n{"name": "tw')
    assert list(read_lines(file)) == ["one"]
