"""The library of the studio: what is found among the runs, renamed and deleted."""

import json
import shutil

import jax.numpy as jnp
import pytest
from etils import epath
from PIL import Image

from perfusion_jax import InputError, load_concept
from perfusion_jax.formats.concept_file import ConceptCard, digests, save_concept
from perfusion_jax.learning.report import Report
from perfusion_jax.runtime.files import locked
from perfusion_jax.web.library import (
    check_name,
    delete,
    doomed_with,
    find_entries,
    find_entry,
    named_in,
    rename,
)


def save(base, runs, run, name, step=4):
    concept = base.new_concept("dog", jnp.eye(base.model.context_width))
    card = ConceptCard(name, "dog", "small", base.fingerprint, 0.6, 0.15, guidance_scale=6.0, step=step)
    save_concept(runs / run / "concepts" / f"{name}.safetensors", concept, card)


def picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


@pytest.fixture
def runs(small_base, tmp_path):
    """A run of rex alone, and a fleet of tom and another rex."""
    save(small_base, tmp_path, "rex", "rex")
    (tmp_path / "rex" / "config.json").write_text(json.dumps({"name": "rex", "steps": 4}))
    lines = [{"step": 2, "score": 0.1}, {"step": 4, "score": 0.5, "image_similarity": 0.25}, {"step": 4, "loss": 1.0}]
    (tmp_path / "rex" / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    picture(tmp_path / "rex" / "samples" / "step_000002.png")
    picture(tmp_path / "rex" / "samples" / "step_000004.png")
    for name in ("tom", "rex"):
        save(small_base, tmp_path, "fleet", name)
        picture(tmp_path / "fleet" / "samples" / f"{name}.png")
    report = [{"name": "tom", "state": "done", "score": 0.75}, {"name": "rex", "state": "done", "score": 0.5}]
    (tmp_path / "fleet" / "report.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in report))
    return tmp_path


def test_finds_concepts_with_the_pictures_and_scores_of_the_step_that_was_kept(runs):
    (runs / "rex" / "concepts" / "half.safetensors").write_bytes(b"half copied")
    for hidden in (".studio", ".trash"):
        shutil.copytree(runs / "rex", runs / hidden)
    found = {entry.key: entry for entry in find_entries(runs)}
    assert list(found) == ["fleet/rex", "fleet/tom", "rex/rex"]
    assert [entry.call for entry in found.values()] == ["rex-fleet", "tom", "rex"]
    assert found["rex/rex"].grid == runs / "rex" / "samples" / "step_000004.png"
    assert found["rex/rex"].scores == {"score": 0.5, "image_similarity": 0.25}
    assert found["fleet/tom"].grid == runs / "fleet" / "samples" / "tom.png"
    assert found["fleet/tom"].scores == {"score": 0.75}


def test_every_concept_has_a_name_of_its_own_in_prompts(small_base, runs):
    save(small_base, runs, "a run, of mine", "rex-fleet")
    save(small_base, runs, "Zoë", "rex")
    calls = [entry.call for entry in find_entries(runs)]
    assert len(calls) == len(set(calls)) == 5
    prompt = " and ".join(f"<{call}>" for call in calls)
    assert [entry.call for entry in named_in(prompt, find_entries(runs))] == calls


def test_a_prompt_names_concepts_in_its_own_order_and_unknown_ones_are_told(runs):
    entries = find_entries(runs)
    assert [entry.key for entry in named_in("<tom> beside <rex>, <tom>", entries)] == ["fleet/tom", "rex/rex"]
    with pytest.raises(InputError, match="<bob> is not in the library; there are <rex-fleet>, <tom>, <rex>"):
        named_in("a <bob>", entries)
    with pytest.raises(InputError, match="none yet"):
        named_in("a <bob>", [])


def test_a_renamed_concept_is_whole_and_its_run_knows_the_name(small_base, runs):
    before = load_concept(runs / "rex" / "concepts" / "rex.safetensors", small_base)
    key = rename(find_entry(runs, "rex/rex"), " max ")
    entry = find_entry(runs, key)
    after = load_concept(entry.file, small_base)
    assert (key, entry.file.name, after.card.name) == ("rex/max", "max.safetensors", "max")
    assert jnp.array_equal(after.concept.target_input, before.concept.target_input)
    assert entry.grid is not None
    assert entry.scores["score"] == 0.5
    assert json.loads((runs / "rex" / "config.json").read_text())["name"] == "max"
    assert not (runs / "rex" / "concepts" / "rex.safetensors").exists()


def test_a_fleet_keeps_the_line_of_the_old_name_so_that_nothing_is_learnt_again(runs):
    key = rename(find_entry(runs, "fleet/tom"), "tim")
    report = Report(epath.Path(runs / "fleet" / "report.jsonl"))
    assert report.is_over("tom")
    assert report.is_over("tim")
    assert find_entry(runs, key).grid == runs / "fleet" / "samples" / "tim.png"
    assert find_entry(runs, key).scores == {"score": 0.75}


@pytest.mark.parametrize("name", ["../x", "", "a b", "<rex>", "-x", "x/y", "x\ny", "ré", "x" * 61])
def test_names_that_are_none_are_refused(runs, name):
    with pytest.raises(InputError, match="take letters from a to z, digits"):
        check_name(name)
    with pytest.raises(InputError, match="take letters from a to z, digits"):
        rename(find_entry(runs, "rex/rex"), name)


@pytest.mark.parametrize(
    ("name", "near"), [("Žofka", "Zofka"), ("my dog", "my-dog"), ("../x", "x"), ("x" * 61, "x" * 60), ("-é-", "e")]
)
def test_a_name_is_proposed_in_place_of_one_that_is_none(name, near):
    with pytest.raises(InputError, match=f"such as {near}$"):
        check_name(name)
    assert check_name(near) == near


def test_a_taken_name_and_a_run_at_work_are_refused(runs):
    with pytest.raises(InputError, match="there is a rex in this run already"):
        rename(find_entry(runs, "fleet/tom"), "rex")
    entry = find_entry(runs, "rex/rex")
    with locked(epath.Path(runs / "rex" / "lock"), ""), pytest.raises(InputError, match="stop it first"):
        rename(entry, "max")
    with locked(epath.Path(runs / "rex" / "lock"), ""), pytest.raises(InputError, match="stop it first"):
        delete(entry)
    assert entry.file.exists()


def test_deleting_takes_a_run_of_one_and_leaves_the_others_of_a_fleet(runs):
    (runs / "rex" / "checkpoints" / "4").mkdir(parents=True)
    delete(find_entry(runs, "rex/rex"))
    assert not (runs / "rex").exists()
    assert not list((runs / ".studio" / "trash").iterdir())
    delete(find_entry(runs, "fleet/tom"))
    assert [entry.key for entry in find_entries(runs)] == ["fleet/rex"]
    assert not (runs / "fleet" / "samples" / "tom.png").exists()
    with pytest.raises(InputError, match="no such concept"):
        find_entry(runs, "fleet/tom")


def test_deleting_takes_what_the_run_wrote_and_nothing_else(small_base, runs):
    (runs / "rex" / "notes.txt").write_text("mine")
    save(small_base, runs, "downloads", "max")
    (runs / "downloads" / "thesis.tex").write_text("mine")
    picture(runs / "downloads" / "samples" / "holiday.png")
    delete(find_entry(runs, "rex/rex"))
    delete(find_entry(runs, "downloads/max"))
    assert [
        str(file.relative_to(runs)) for run in ("rex", "downloads") for file in sorted((runs / run).rglob("*"))
    ] == [
        *("rex/notes.txt", "downloads/samples", "downloads/samples/holiday.png", "downloads/thesis.tex"),
    ]


def test_a_run_whose_config_is_of_another_concept_stays(small_base, runs):
    save(small_base, runs, "rex", "copied")
    (runs / "rex" / "concepts" / "rex.safetensors").unlink()
    delete(find_entry(runs, "rex/copied"))
    assert (runs / "rex" / "metrics.jsonl").exists()
    assert (runs / "rex" / "config.json").exists()


def test_a_kill_while_a_run_is_deleted_leaves_no_half_of_it(runs, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("perfusion_jax.web.library.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete(find_entry(runs, "rex/rex"))
    assert not (runs / "rex").exists()
    assert "rex/rex" not in [entry.key for entry in find_entries(runs)]


def test_photographs_go_if_that_is_said_and_no_other_run_has_them(small_base, runs):
    folder = runs / "pictures" / "rex"
    picture(folder / "picture_01.png")
    for run in ("rex", "max"):
        save(small_base, runs, run, run)
        (runs / run / "config.json").write_text(json.dumps({"name": run, "pictures": str(folder)}))
    assert doomed_with(find_entry(runs, "rex/rex")).photographs is None
    delete(find_entry(runs, "max/max"))
    assert folder.exists()
    assert doomed_with(find_entry(runs, "rex/rex")).photographs == folder
    delete(find_entry(runs, "rex/rex"), photographs=True)
    assert not folder.exists()


@pytest.mark.parametrize("key", ["../rex/rex", "rex/../fleet/tom", "/etc/passwd", ""])
def test_a_key_is_looked_up_and_never_a_path(runs, key):
    with pytest.raises(InputError, match="no such concept"):
        find_entry(runs, key)


def test_a_name_in_a_file_is_no_path(small_base, runs):
    outside = runs.parent / "victim"
    outside.mkdir()
    concept = small_base.new_concept("dog", jnp.eye(small_base.model.context_width))
    card = ConceptCard("../../../victim", "dog", "small", small_base.fingerprint, 0.6, 0.15, guidance_scale=6.0, step=4)
    save_concept(runs / "rex" / "concepts" / "evil.safetensors", concept, card)
    assert "rex/evil" not in [entry.key for entry in find_entries(runs)]
    with pytest.raises(InputError, match="its metadata cannot be read"):
        load_concept(runs / "rex" / "concepts" / "evil.safetensors", small_base)
    delete(find_entry(runs, "rex/rex"))
    assert outside.exists()


def test_a_fleet_that_was_split_is_not_deleted_with_one_of_its_concepts(small_base, runs):
    save(small_base, runs, "split", "bob")
    shard = runs / "split" / "shard_0_of_2"
    shard.mkdir()
    (shard / "report.jsonl").write_text('{"name": "bob", "state": "done", "score": 0.25}\n')
    entry = find_entry(runs, "split/bob")
    assert entry.scores == {"score": 0.25}
    with locked(epath.Path(shard / "lock"), ""), pytest.raises(InputError, match="stop it first"):
        delete(entry)
    delete(entry)
    assert (shard / "report.jsonl").exists()


def test_the_name_of_a_member_that_is_still_to_be_learnt_is_taken(runs):
    (runs / "fleet" / "concepts.jsonl").write_text('{"name": "tom"}\n{"name": "cup"}\n')
    with pytest.raises(InputError, match="there is a cup in this run already"):
        rename(find_entry(runs, "fleet/tom"), "cup")
    assert find_entry(runs, "fleet/tom").file.exists()


def test_a_renamed_concept_is_known_by_what_it_was(runs):
    before = digests(find_entry(runs, "rex/rex").file)
    key = rename(find_entry(runs, rename(find_entry(runs, "rex/rex"), "max")), "moritz")
    now = digests(find_entry(runs, key).file)
    assert len(before) == 1
    assert len(now) == 3
    assert before[0] in now
