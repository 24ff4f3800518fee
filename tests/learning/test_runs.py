"""What a run makes sure of before it learns."""

import pytest
from etils import epath
from odd_names import ODD_NAMES

from perfusion_jax import InputError
from perfusion_jax.learning.runs import _check_split


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
