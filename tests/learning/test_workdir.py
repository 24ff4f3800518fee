"""What a run finds in its workdir, and what it must not touch there."""

import json

import pytest
from etils import epath

from perfusion_jax import InputError
from perfusion_jax.config import make_config, to_json
from perfusion_jax.data.table import PER_CONCEPT, Row
from perfusion_jax.learning.records import Records, report_line
from perfusion_jax.learning.rounds import Member
from perfusion_jax.learning.workdir import WRITTEN, begin


def rex(**values):
    return make_config("emoji", name="rex", super_category="dog", pictures="photos/", **values)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "clip", "name": "vit"}'),
        ("config.json", "{ // of another tool"),
        ("metrics.jsonl", '{"step": 5}\n'),
        ("checkpoints/model.safetensors", "weights"),
        ("masks.png", "a person's"),
        ("concepts/rex.safetensors", "learnt elsewhere"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path, name, content):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    for config in (rex(), rex(concepts="table.csv")):
        with pytest.raises(InputError, match=r"take another --workdir"):
            begin(config, epath.Path(tmp_path))
    assert file.read_text() == content
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_what_a_run_would_not_touch_is_no_hindrance(tmp_path):
    for name in ("concepts/tom/1.jpg", "notes.txt", "photos/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    begin(rex(), epath.Path(tmp_path))
    begin(rex(), epath.Path(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "rex"
    assert "config.json" in WRITTEN


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    config = rex()
    saved = json.loads(to_json(config))
    del saved["snr_gamma"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"snr_gamma was 0\.0, is 5\.0"):
        begin(rex(snr_gamma=5.0), epath.Path(tmp_path))
    begin(config, epath.Path(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**saved, "colour": "red"}))
    with pytest.raises(InputError, match=r"another version, which had the keys colour"):
        begin(config, epath.Path(tmp_path))


def test_a_run_is_finished_when_all_that_it_was_asked_for_is_written(tmp_path):
    config = rex(steps=8)
    member = Member(
        Row(**{name: config[name] for name in PER_CONCEPT}, masks="", captions="", overrides={}, cells={}, where=""),
        config,
    )
    records = Records(epath.Path(tmp_path), epath.Path(tmp_path), report=None)
    assert not records.is_finished(member)
    file = tmp_path / "concepts" / "rex.safetensors"
    file.parent.mkdir()
    file.write_text("")
    records.add([report_line(member.row, "done", steps=8, exports=["lora"])])
    assert records.is_finished(member)
    for changed, finished in (({"steps": 9}, False), ({"exports": ("lora", "embedding")}, False), ({"steps": 7}, True)):
        other = member._replace(config=rex(**{"steps": 8, **changed}))
        assert records.is_finished(other) is finished, changed
    (tmp_path / "finished.json").write_text("{")
    assert not records.is_finished(member)
    file.unlink()
    records.add([report_line(member.row, "done", steps=8, exports=[])])
    assert not records.is_finished(member)
