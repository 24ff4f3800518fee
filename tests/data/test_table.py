"""Tables of concepts: every way to write one, and every mistake named with its file, line and key."""

import json

import pytest
from etils import epath
from odd_names import ODD_NAMES

from configs import fleet
from perfusion_jax import InputError
from perfusion_jax.config import OVERRIDES, check, member_config
from perfusion_jax.data.table import read_table
from perfusion_jax.runtime import shipped
from perfusion_jax.runtime.errors import UnavailableError


def write(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    return str(file)


def rows_of(tmp_path, name, text):
    return read_table(write(tmp_path, name, text), OVERRIDES)


def test_a_csv_and_a_jsonl_table_say_the_same(tmp_path):
    csv = (
        "name,super_category,pictures,masks,captions,steps,flip,values_rate,licence\n"
        "rex,dog,rex,,,600,FALSE,0.01,\n"
        'my-cup,"coffee cup",gs://bucket/cup,cup_masks,~/captions,,,,CC-0\n'
        "tom,cat,emoji:cat,,,,,,\n"
    )
    lines = [
        {
            "name": "rex",
            "super_category": "dog",
            "pictures": "rex",
            "steps": 600,
            "flip": False,
            "values_rate": 0.01,
        },
        {
            "name": "my-cup",
            "super_category": "coffee cup",
            "pictures": "gs://bucket/cup",
            "masks": "cup_masks",
            "captions": "~/captions",
            "licence": "CC-0",
        },
        {"name": "tom", "super_category": "cat", "pictures": "emoji:cat"},
    ]
    jsonl = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    ours = [row._replace(where="") for row in rows_of(tmp_path, "a.csv", "\ufeff" + csv)]
    assert ours == [row._replace(where="") for row in rows_of(tmp_path, "a.jsonl", jsonl)]
    rex, cup, tom = ours
    assert rex.overrides == {"steps": 600, "flip": False, "values_rate": 0.01}
    assert (rex.pictures, rex.masks) == (str(tmp_path / "rex"), "")
    assert (cup.pictures, cup.masks, cup.captions) == ("gs://bucket/cup", str(tmp_path / "cup_masks"), "~/captions")
    assert (tom.pictures, tom.overrides) == ("emoji:cat", {})
    config = member_config(fleet.get_config(), rex)
    assert (config.name, config.super_category, config.steps, config.flip) == ("rex", "dog", 600, False)
    assert config.batch_size == fleet.get_config().batch_size


@pytest.mark.parametrize("name", ODD_NAMES)
def test_tables_and_folders_may_have_any_name(tmp_path, name):
    (row,) = rows_of(tmp_path, f"{name}.csv", f"name,super_category,pictures\nrex,dog,{name}\n")
    assert row.pictures == str(tmp_path / name)
    (tmp_path / name / "rex").mkdir(parents=True)
    (tmp_path / name / "rex" / "concept.json").write_text('{"super_category": "dog"}')
    (row,) = read_table(str(tmp_path / name), OVERRIDES)
    assert row.pictures == str(tmp_path / name / "rex")


def test_a_folder_of_folders_and_the_examples_that_ship(tmp_path):
    for name in ("tom", "rex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "concept.json").write_text('{"super_category": "cat", "licence": "MIT", "seen": 3}')
    (tmp_path / "notes.txt").write_text("not a concept")
    rex, tom = read_table(str(tmp_path), OVERRIDES)
    assert (rex.name, tom.name, rex.super_category) == ("rex", "tom", "cat")
    assert rex.overrides == {"licence": "MIT"}
    assert rex.pictures == str(tmp_path / "rex")
    shipping = read_table("emoji", OVERRIDES)
    assert len(shipping) == 8
    assert next(row for row in shipping if row.name == "jeep").super_category == "car"
    assert next(row for row in shipping if row.name == "jeep").pictures == str(shipped.EXAMPLES / "jeep")


HEAD = "name,super_category,pictures"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", f"{HEAD}\nrex,dog,r\nrex,cat,c\n", r"a\.csv:3: name is 'rex', as in .*a\.csv:2; rename one"),
        ("a.csv", f"{HEAD}\nrex,dog,r\nRex,cat,c\n", r"a\.csv:3: name is 'Rex', as in .*a\.csv:2"),
        ("a.csv", f"{HEAD}\n../x,dog,r\n", r"a\.csv:2: name is '\.\./x'; it must be letters"),
        (
            "a.csv",
            f"{HEAD}\n_dog,dog,r\n",
            r"a\.csv:2: name is '_dog'; it must be .*, and begin with a letter or a digit",
        ),
        (
            "a.csv",
            f"{HEAD.replace(',', ';')}\nrex;dog;r\n",
            r"a\.csv:1: its columns are separated by ';': save it with",
        ),
        ("a.csv", f"{HEAD.replace(',', chr(9))}\n", r"a\.csv:1: its columns are separated by tabs"),
        ("a.csv", f"{HEAD}\nmy dog,dog,r\n", r"a\.csv:2: name is 'my dog'; it must be letters"),
        ("a.csv", f"{HEAD}\n,dog,r\n", r"a\.csv:2: name is missing"),
        ("a.csv", f"{HEAD}\nrex,dog\n", r"a\.csv:2: pictures is missing"),
        ("a.csv", f"{HEAD}\nrex,dog,r,more\n", r"a\.csv:2: more cells than columns"),
        ("a.csv", "name,pictures\nrex,r\n", r"a\.csv:1: no column 'super_category'"),
        ("a.csv", f"{HEAD},stepz\nrex,dog,r,3\n", r"a\.csv:2: stepz is not a key of the table; these are: name,"),
        ("a.csv", f"{HEAD},templates\nrex,dog,r,a\n", r"a\.csv:2: templates is not a key of the table"),
        ("a.csv", f'{HEAD}\nrex,"dog\n', r"a\.csv: cannot be read"),
        ("a.csv", f"{HEAD}\n", r"a\.csv: no concepts in it"),
        ("a.csv", "", r"a\.csv:1: no column 'name'"),
        ("a.jsonl", '{"name": "rex"\n', r"a\.jsonl:1: not JSON"),
        ("a.jsonl", '\n["rex"]\n', r"a\.jsonl:2: not an object"),
        ("a.jsonl", '{"name": "rex", "super_category": "dog", "pictures": 3}', r"a\.jsonl:1: pictures is 3"),
        (
            "a.txt",
            "rex",
            r"a\.txt: no such folder; config\.concepts must be one of concept folders, or a \.csv or \.jsonl",
        ),
        ("a.csv", "\udcff", r"a\.csv: cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_table(str(file), OVERRIDES)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("Forbidden: storage.objects.get"), InputError),
        (PermissionError(13, "Permission denied"), InputError),
        (OSError(30, "Read-only file system"), InputError),
        (ValueError("Bad Request"), InputError),
        (ImportError("Please install gcsfs"), InputError),
        (OSError(5, "Input/output error"), UnavailableError),
        (RuntimeError("503, backend error"), UnavailableError),
    ],
)
def test_storage_that_fails_for_now_is_not_bad_input(tmp_path, monkeypatch, error, kind):
    def fail(_):
        raise error

    (tmp_path / "a.csv").write_text("name,super_category,pictures\nrex,dog,rex\n")
    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_bytes", fail)
    with pytest.raises(InputError, match=r"a\.csv: cannot be read") as raised:
        read_table(str(tmp_path / "a.csv"), OVERRIDES)
    assert type(raised.value) is kind


def test_folders_that_storage_does_not_tell_of_are_not_left_out(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    (tmp_path / "rex").mkdir()
    kind = type(epath.Path(tmp_path))
    # As gcsfs has it: whatever fails, something is neither a file nor a folder.
    monkeypatch.setattr(kind, "is_file", lambda _: False)
    monkeypatch.setattr(kind, "is_dir", lambda _: False)
    monkeypatch.setattr(kind, "read_text", fail)
    with pytest.raises(UnavailableError, match=r"rex/concept\.json: cannot be read"):
        read_table(str(tmp_path), OVERRIDES)
    monkeypatch.setattr(kind, "iterdir", fail)
    with pytest.raises(UnavailableError, match=f"{tmp_path}: cannot be read"):
        read_table(str(tmp_path), OVERRIDES)


def test_what_a_line_says_does_not_depend_on_where_the_table_is(tmp_path):
    digests = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        digests |= {row.digest for row in rows_of(tmp_path / name, "a.csv", f"{HEAD}\nrex,dog,rex\n")}
    assert len(digests) == 1
    digests |= {row.digest for row in rows_of(tmp_path, "a.csv", f"{HEAD},steps\nrex,dog,rex,5\nrex2,dog,rex,\n")}
    assert len(digests) == 3


def test_folders_without_facts_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder; config\.concepts must be"):
        read_table(str(tmp_path / "nowhere"), OVERRIDES)
    with pytest.raises(InputError, match="no concepts in it"):
        read_table(str(tmp_path), OVERRIDES)
    with pytest.raises(InputError, match=r"missing\.csv: cannot be read"):
        read_table(str(tmp_path / "missing.csv"), OVERRIDES)
    (tmp_path / ".git").mkdir()
    for name, text, problem in (
        ("rex", None, "missing or empty; it must say"),
        ("tom", "[]", "not an object, such as"),
        ("bob", "{}", "super_category is missing"),
        ("max", "{", "not JSON"),
        ("cup", '{"super_category": "cup", "licence": 3}', "licence is 3; it must be text"),
        ("big", '{"size": ' + "9" * 5000 + "}", "not JSON"),
        ("deep", "[" * 100_000, "not JSON"),
        ("my dog", '{"super_category": "dog"}', "name is 'my dog'; it must be letters"),
        ("Zoe", '{"super_category": "dog"}', ""),
        ("zoe", '{"super_category": "dog"}', "name is 'zoe', as in "),
    ):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "concept.json").write_text(text)
        row = next(row for row in read_table(str(tmp_path), OVERRIDES) if row.name == name)
        # One concept's failure, which the others need not wait for.
        assert row.problem.startswith(f"{tmp_path / name / 'concept.json'}: {problem}" if problem else "")
        assert bool(row.problem) == bool(problem)
    assert len(read_table(str(tmp_path), OVERRIDES)) == 10


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("steps", "0", r"a\.csv:2: config\.steps is 0; it must be at least 1"),
        ("steps", "many", r"a\.csv:2: config\.steps is 'many', of type str instead of int"),
        ("flip", "maybe", r"a\.csv:2: config\.flip is 'maybe'"),
        ("temperature", "0", r"a\.csv:2: config\.temperature is 0; it must be above 0"),
    ],
)
def test_impossible_overrides_are_named(tmp_path, column, value, message):
    row = rows_of(tmp_path, "a.csv", f"{HEAD},{column}\nrex,dog,r,{value}\n")[0]
    with pytest.raises(InputError, match=message):
        member_config(fleet.get_config(), row)


@pytest.mark.parametrize("base", ["emoji", "sd15", "some/folder"])
def test_the_fleet_config_that_ships_is_possible(base):
    config = fleet.get_config(base)
    check(config)
    for row in read_table(config.concepts, OVERRIDES):
        member_config(config, row)


@pytest.mark.parametrize(
    ("key", "value"),
    [("members", -1), ("mesh", (1, 1, 1)), ("mesh", (0, 1)), ("validate_every", -1)],
)
def test_impossible_fleets_are_named(key, value):
    config = fleet.get_config()
    config[key] = value
    with pytest.raises(InputError, match=rf"config\.{key} is"):
        check(config)


@pytest.mark.parametrize("key", ["name", "super_category", "pictures"])
def test_what_the_table_says_of_each_concept_is_not_given_for_all(key):
    config = fleet.get_config()
    config[key] = "dog"
    with pytest.raises(InputError, match=rf"config\.{key} plays no part where config\.concepts names a table"):
        check(config)
    config = fleet.get_config()
    config.members = 3  # of the fleet, and of none of its concepts alone
    for row in read_table(config.concepts, OVERRIDES):
        assert not member_config(config, row).members
