"""What a run makes sure of before it learns, and tells of what cannot be learnt."""

import pytest
from etils import epath
from odd_names import ODD_NAMES

from perfusion_jax import InputError
from perfusion_jax.config import make_config
from perfusion_jax.data.table import Row
from perfusion_jax.learning.preparation import Prepared
from perfusion_jax.learning.records import Records
from perfusion_jax.learning.report import Report
from perfusion_jax.learning.rounds import Member, Round
from perfusion_jax.learning.runs import _check_split, _report_failures
from perfusion_jax.learning.step import Settings


@pytest.mark.parametrize("name", ODD_NAMES)
def test_shards_of_another_split_are_found_in_a_folder_of_any_name(tmp_path, name):
    workdir = epath.Path(tmp_path / name)
    _check_split(workdir, 2)  # there is nothing yet
    (workdir / "shard_0_of_12").mkdir(parents=True)
    (workdir / "shard_0_of_12" / "report.jsonl").write_text("a line")
    _check_split(workdir, 12)
    for count in (1, 2):
        with pytest.raises(InputError, match="shard_0_of_12 is of another split"):
            _check_split(workdir, count)


def test_a_fault_of_the_program_leaves_its_traceback_in_the_log_and_a_line_in_the_report(tmp_path, caplog):
    names = ("rex", "tom")
    rows = [Row(name, "dog", f"{name}/", masks="", captions="", overrides={}, cells={}, where="") for name in names]
    members = tuple(Member(row, make_config()) for row in rows)
    faults = {}
    for slot, error in enumerate((InputError("rex/: no pictures"), ZeroDivisionError("a fault of ours"))):
        try:
            raise error
        except (InputError, ZeroDivisionError) as raised:
            faults[slot] = raised
    records = Records(epath.Path(tmp_path), epath.Path(tmp_path), Report(epath.Path(tmp_path / "report.jsonl")))
    prepared = Prepared({}, {}, {}, {}, faults)
    assert _report_failures(Round(members, Settings.of(make_config())), prepared, records) == {0, 1}
    errors = {name: line["error"] for name, line in records.report.lines.items()}
    assert errors == {"rex": "rex/: no pictures", "tom": "tom/: ZeroDivisionError: a fault of ours"}
    (record,) = caplog.records
    assert record.exc_info[1] is faults[1]
